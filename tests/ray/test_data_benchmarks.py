"""The benchmarks of the stream at a small size: they run, and their results have the right form."""

from benchmarks import plan_scale, stream_rate


def test_the_scale_of_a_plan_is_measured(ray_cluster):
    figures = plan_scale.run(shards=12, epochs=2)
    assert (figures.pairs, figures.tasks) == (24, 8)
    assert figures.first_s.keys() == {"start", "restart"}
    assert all(figures.callable_s[name] < seconds < 300 for name, seconds in figures.first_s.items())
    assert figures.driver_peak >= figures.driver_before


def test_the_rate_of_blocks_is_measured(ray_cluster):
    rate = stream_rate.measure(1 << 16, 0.001, blocks=16, shards=4)
    assert rate.blocks == 14  # the first of each rank begins the time
    assert rate.blocks_per_second > 0
