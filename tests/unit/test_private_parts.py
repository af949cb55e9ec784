"""Private parts of other packages that we use: each is listed with the version it was seen in, and compared with it.

A part that changed fails here, before it fails in a job. Read what changed, mend what uses it, then write its new
version and fingerprint, which the failure prints, into the table.
"""

import ast
import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from betakd_ray.engine.collectives import BUFFER

PACKAGE = Path(__file__).parents[2] / "betakd_ray"

COORDINATOR = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"
AUTHENTICATION = "ray._private.authentication.authentication_token_setup"
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
SETUP_HOOK = "ray._private.runtime_env.setup_hook"
DISPATCH = "torch.utils._python_dispatch"
PARTS = {
    # path of the part: (distribution, version it was seen in, fingerprint)
    f"{ENGINE}.load_checkpoint": ("deepspeed", "0.19.8", "5728d3dfa42a"),
    f"{ENGINE}._zero3_consolidated_16bit_state_dict": ("deepspeed", "0.19.8", "4d7c0d9c1571"),
    "deepspeed.comm.torch.build_shm_op": ("deepspeed", "0.19.8", "2bf3cff9e3d1"),
    "deepspeed.ops.op_builder.builder.OpBuilder.load": ("deepspeed", "0.19.8", "47d513ddccc5"),
    "fsspec.spec.AbstractFileSystem._strip_protocol": ("fsspec", "2026.9.0", "d7bfe5591d2c"),
    f"{AUTHENTICATION}._get_default_token_path": ("ray", "2.60.0", "7f47c0fdb937"),
    f"{AUTHENTICATION}.ensure_token_if_auth_enabled": ("ray", "2.60.0", "25d72ad09c4b"),
    "ray._private.grpc_utils.init_grpc_channel": ("ray", "2.60.0", "b77aea5140c8"),
    f"{SETUP_HOOK}.load_and_execute_setup_hook": ("ray", "2.60.0", "62255601cd85"),
    "ray._private.utils.get_runtime_env_info": ("ray", "2.60.0", "8d782f74d338"),
    "ray._private.services.get_node_ip_address": ("ray", "2.60.0", "68e6d6e67ed4"),
    "ray._raylet.InnerGcsClient.get_cluster_status": ("ray", "2.60.0", "58180ac5d3b3"),
    "ray.data._internal.execution.execution_callback.ExecutionCallback": ("ray", "2.60.0", "f73e921a09d3"),
    f"{COORDINATOR}.TrainAutoscalingCoordinatorClient.send_resource_request": ("ray", "2.60.0", "59e083c3cda1"),
    "ray.train.torch.config._TorchBackend.on_start": ("ray", "2.60.0", "2d82fd3c0531"),
    "ray.train.v2._internal.execution.callback.ControllerCallback": ("ray", "2.60.0", "fa77d1b4796b"),
    "ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError": ("ray", "2.60.0", "42a3dc53c46c"),
    "torch._subclasses.fake_tensor.FakeTensorMode.__init__": ("torch", "2.13.0+cpu", "e7923d9063ac"),
    "torch._subclasses.fake_tensor.unset_fake_temporarily": ("torch", "2.13.0+cpu", "8310fcc18043"),
    "torch.distributed.distributed_c10d._World.pg_map": ("torch", "2.13.0+cpu", "08f9586e5eed"),
    "torch.distributed.distributed_c10d._set_pg_timeout": ("torch", "2.13.0+cpu", "9562741d2772"),
    f"{DISPATCH}.TorchDispatchMode.__torch_dispatch__": ("torch", "2.13.0+cpu", "70b067f6c816"),
    f"{DISPATCH}.is_traceable_wrapper_subclass": ("torch", "2.13.0+cpu", "1d97b30149f2"),
    "torch.utils._pytree.tree_leaves": ("torch", "2.13.0+cpu", "5fdc4a1e690f"),
    "torch.utils.cpp_extension._jit_compile": ("torch", "2.13.0+cpu", "10fbddf4ff83"),
    "torch.utils.file_baton.FileBaton.wait": ("torch", "2.13.0+cpu", "81681b63359f"),
    "transformers.utils.chat_template_utils._compile_jinja_template": ("transformers", "5.23.0", "38f46c999966"),
    "transformers.PreTrainedModel._finalize_model_loading": ("transformers", "5.23.0", "6497a08c2632"),
}
COVERED = {
    # how our code spells it: the part it is, or belongs to
    COORDINATOR: f"{COORDINATOR}.TrainAutoscalingCoordinatorClient.send_resource_request",
    "distributed_c10d._set_pg_timeout": "torch.distributed.distributed_c10d._set_pg_timeout",
    "distributed_c10d._world": "torch.distributed.distributed_c10d._World.pg_map",
    "engine._config": f"{ENGINE}.load_checkpoint",
    "engine._zero3_consolidated_16bit_state_dict": f"{ENGINE}._zero3_consolidated_16bit_state_dict",
    "OpBuilder._loaded_ops": "deepspeed.ops.op_builder.builder.OpBuilder.load",
    "ray._private.ray_constants": "ray._private.services.get_node_ip_address",
    "ray._private.ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{SETUP_HOOK}.load_and_execute_setup_hook",
    "ray._raylet.GcsClient": "ray._raylet.InnerGcsClient.get_cluster_status",
    "filesystem._strip_protocol": "fsspec.spec.AbstractFileSystem._strip_protocol",
    "ray.train.torch.config._TorchBackend": "ray.train.torch.config._TorchBackend.on_start",
    "PreTrainedModel._finalize_model_loading": "transformers.PreTrainedModel._finalize_model_loading",
    "S3._strip_protocol": "fsspec.spec.AbstractFileSystem._strip_protocol",
    "torch._subclasses.fake_tensor.FakeTensor": "torch._subclasses.fake_tensor.FakeTensorMode.__init__",
    "torch._subclasses.fake_tensor.FakeTensorMode": "torch._subclasses.fake_tensor.FakeTensorMode.__init__",
    f"{DISPATCH}.TorchDispatchMode": f"{DISPATCH}.TorchDispatchMode.__torch_dispatch__",
}  # fmt: skip


OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
"""Public names that begin with `_`, so that no field has them."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES


def private_uses() -> Iterator[str]:
    """Yield each private name of another package that the library imports, or reads from an object not its own."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {node.attr for node in attributes if ast.unparse(node.value) in ("self", "cls")}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("betakd_ray"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name for name in names if any(map(is_private, name.split("."))))
            elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls", "os"):
                    yield f"{owner}.{node.attr}"


def test_every_private_part_in_use_is_listed() -> None:
    used = set(private_uses())
    assert {COVERED.get(name, name) for name in used} <= PARTS.keys()
    assert COVERED.keys() <= used  # and nothing that is not used any more


def part_of(path: str) -> Any:
    """Return the object at a dotted path."""
    names = path.split(".")
    for count in range(len(names) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:count]))
        except ModuleNotFoundError:
            continue
        for name in names[count:]:
            found = getattr(found, name)
        return found
    raise LookupError(path)


def fingerprint(path: str) -> str:
    """Return a hash of the part's source; of its signature where it is compiled."""
    part = part_of(path)
    part = getattr(part, "__func__", None) or getattr(part, "fget", None) or part
    try:
        text = inspect.getsource(part)
    except (TypeError, OSError):
        text = f"{type(part).__name__}: {part.__doc__}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("path", PARTS)
def test_a_private_part_is_as_it_was_seen(path: str) -> None:
    distribution, seen_in, seen = PARTS[path]
    now = fingerprint(path)
    assert now == seen, f"{path}: seen in {distribution} {seen_in}, now {version(distribution)}: {now}"


def test_deepspeeds_shared_memory_has_the_name_under_which_it_is_removed() -> None:
    import deepspeed

    source = Path(deepspeed.__file__).parent.joinpath("ops", "csrc", "cpu", "comm", "shm.cpp").read_text()
    assert f'#define SHM_BUFFER_NAME "{BUFFER}"' in source
    prefix = r'"%s_%d_%s_%s",\s*SHM_BUFFER_NAME,\s*getuid\(\),\s*addr_string,\s*port_string'
    assert re.search(prefix, source)
    assert '"%s_%d", shm_name_prefix, rank)' in source
