"""One rank leads: it plans, writes and prints, and hands out calls that all make together."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fpq_analysis.errors import UserError
from fpq_analysis.ranks.division import over_ranks, undivided
from fpq_analysis.ranks.meetings import PATIENCE, as_shared, portable, reaching

T = TypeVar("T")

_leading = False


def lead(work: Callable[[], T]) -> T:
    """Let the first rank do the work, and the others what it hands out by `together`; its result, on every rank.

    Raises:
        UserError: on every rank what the first one raised; if a rank cannot be reached.
    """
    global _leading
    with undivided():
        if dist.get_rank() > 0:
            return _follow()
        outcome: tuple[Any, Exception | None] = None, None
        _leading = True
        try:
            outcome = work(), None
            return outcome[0]
        except Exception as error:
            outcome = None, portable(error)
            raise as_shared(error)  # noqa: B904 -- it is the same
        finally:
            _leading = False
            with suppress(UserError):  # all that is left to do is to end
                _tell((None, outcome))


def leading() -> bool:
    """Whether others wait for this rank to hand out calls."""
    return _leading and dist.get_world_size() > 1


def together(call: Callable[[], T]) -> T:
    """Make the call on all ranks, inside `over_ranks()`; where this one does not lead others, here.

    Args:
        call: that other processes can be handed.
    """
    if not leading():
        return call()
    _tell((call, None))
    with over_ranks():
        return call()


def launched(work: Callable[[], T]) -> T:
    """`lead`, in processes that torchrun has started; it ends them when one has ended."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    on_devices = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # NCCL wants one for each
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if on_devices else "gloo"
    store, rank, ranks = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps one store over its restarts: without a name of its own, a rank would find addresses of dead ones.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=ranks)
    signal.signal(signal.SIGTERM, stop)
    try:
        return lead(work)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are ending
        dist.destroy_process_group()


def _follow() -> Any:
    while True:
        call, outcome = _tell(None)
        if call is None:
            break
        with suppress(Exception), over_ranks():  # it is raised on the first rank, which goes on or ends
            call()
    value, error = outcome
    if error is not None:
        raise as_shared(error)
    return value


def _tell(message: Any) -> Any:
    """The first rank's message, on every rank."""
    box = [pickle.dumps(message)]
    with reaching():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return pickle.loads(box[0])
