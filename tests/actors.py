"""Fake handles of actors: the objects behind them are in this process."""

from types import SimpleNamespace

from ray.actor import ActorHandle


class Local(ActorHandle):
    """Fake handle of an actor, for an object in this process."""

    def __init__(self, instance: object) -> None:
        self._instance = instance

    def __del__(self) -> None:
        pass

    __hash__, __eq__ = object.__hash__, object.__eq__

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._instance, name))
