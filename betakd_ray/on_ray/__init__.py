"""The parts that reach into Ray: cluster, data stream, process group, monitor."""
