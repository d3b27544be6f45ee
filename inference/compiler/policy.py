r"""Policy: when to trace, fuse, block, chunk and use several threads.

Thresholds stand here, with their measurement (on a 2-core CPU) where there is one. Decisions depend on counts and never
on a clock, which would make the last digits of a result depend on how busy the machine is.
"""

from __future__ import annotations

TRACE_FIT_STEPS, FUSE_FIT_STEPS = 1000, 5000
"""Steps from which a fit is traced, and fused. Both the cost of compiling and the gain per step grow with the number of
operations of the graph (tens of milliseconds against microseconds per operation), so the number of steps decides."""


BLOCK_STEPS = 50
"""Steps of a fit in one call of a compiled program: a call costs about 20 us, a step of a small model in a block 12."""


BLOCK_NUMBERS = 100_000
"""Numbers among a program's inputs up to which a call costs as much as a step, so that blocks of steps pay."""


TRACE_POTENTIAL_CALLS = 500
"""Calls ahead from which a potential is traced."""


FUSE_POTENTIAL_OPERATIONS = 3_500_000
"""Operations ahead from which a potential is fused: 3 us each, against 4 to 10 s of fusing (20 s with an empty disk
cache)."""


KEPT_USES = 2
"""Uses of a program that is kept on the disk: later calls load it in milliseconds. Four chains of NUTS on eight schools
take 14 s traced; fused they take 22 s the first time, and half a second after that."""


FUSED_NODES = 600
"""Nodes of a potential's graph up to which fusing costs what ``FUSE_POTENTIAL_OPERATIONS`` allows for. Beyond, the cost
is taken to grow with the square of the nodes. That is an assumption: measured are 4 to 10 s for graphs of hundreds of
nodes, and more than an hour, on a busy machine, for one of 4,975."""


MAX_FUSED_NODES = 3000
"""Nodes of a potential's graph above which it is fused only on request. A loop over 200 steps, of 4,975 nodes, took the
C++ compiler more than an hour and 1.9 GB."""


PIECED_NODES = 1000
"""Nodes of one chain's graph from which it is cut into pieces that repeat, if it has any."""


PIECE_NODES, PIECE_LEAST = 300, 100
"""Nodes of a piece at most, and of a stretch that repeats at least: inductor takes 1 to 4 s for 300."""


PIECE_USES = 6
"""Pieces into which a stretch that repeats is cut at least: the first and the last differ from those between."""


PIECE_PROGRAMS = 12
"""Distinct pieces that are compiled at most, at 1 to 4 s each."""


PIECE_SECONDS, PIECE_NODE_SECONDS, PIECE_GAIN = 1.0, 8e-3, 8e-6
"""Seconds that compiling a distinct piece costs, and each of its nodes, and seconds that it saves per operation in each
of its uses in a call."""


PIECE_CALLS = 1500
"""Calls that a run of default length makes: for so many pieces are compiled at least where this is asked for."""


PIECES_COVER = 0.5
"""Share of a graph that has to repeat."""


NUMBERS_PER_DISPATCH = 2000
"""Numbers that are computed in the time in which one operation is dispatched."""


NUTS_GRADIENTS = 12
"""Gradients that a transition of NUTS is expected to take: a tree mostly has 7 or 15."""


PROCESS_OPERATIONS = 2_000_000
"""Operations, 5 us each, that worker processes have to save for chains to run in them. Workers take 2 s to start on a
quiet machine and 5 on a busy one, and each prepares the kernel anew; trees smaller than ``NUTS_GRADIENTS`` save less.
Three chains of 500 transitions of a model with one site, which count as 1,700,000, take as long either way."""


RUN_OPERATIONS, GRADIENT_OVERHEAD = 2, 60
"""Operations of a gradient per one of a run of the model, and operations that take as long as what a kernel of Pyro
does beside each gradient (0.3 ms)."""


SINGLE_THREAD_NUMBERS = 10_000_000
"""Numbers of the data times chains up to which a batched kernel runs in one thread: synchronising several at the end of
each operation costs more than the operation, and many times more on a busy machine."""


THREADED_FIT_NUMBERS = 200_000
"""Numbers of the largest operation of a step from which a fit runs in several threads. Below, a second thread saves at
most 10 us of each operation on a quiet machine (21 us become 13 at 160,000 numbers), while on a busy one operations
wait for threads that do not run: 0.03 to 0.1 ms become 2 to 14 ms."""


PRODUCTS_PER_NUMBER = 10
"""Products of a matrix product, or convolution, that take as long as a number of an operation on each element."""


FUSED_CHUNK = 16_384
"""Iterations of a fused loop that are worth a thread of their own."""


FUSED_PROGRAMS = 16
"""Fused programs that a process keeps, at 5 to 11 MB each; beyond that the one that was not used for the longest time
is dropped. Its library stays mapped: Python unloads no extension module."""


RECORDED_POTENTIALS, RECORDED_NUMBERS = 16, 1_000_000
"""Recorded potentials that a process keeps, and numbers that each may hold. Recording that of eight schools takes
0.1 s, telling that it is the same 2 ms."""


SPENT_KEYS = 64
"""Programs of which a process counts what was computed without them."""


MAX_TRACES = 16
"""Programs that one objective may trace before it is taken to change at every step."""


PACKED_NUMBERS = 1024
"""Numbers up to which a constant of a potential is packed with others: a loop pays for every input in every round."""


STORED_BYTES = 500_000_000
"""Bytes of compiled programs that are kept on the disk, at 2 MB each."""


DRAW_NUMBERS = 10_000_000
"""Numbers of data that one pass over draws may hold; more draws are run in chunks."""


LATENT_NUMBERS = 2_000_000
"""Numbers that the largest latent site may hold in one pass of an evidence estimate, over its rows and particles."""


PARTICLES_FIRST = 128
"""Particles that a pass of importance sampling takes before it takes more rows: an amortized guide reads its rows again
in every pass."""


def execution_of_fit(steps: int, mode: bool | str) -> str:
    """How so many steps run by ``compile=mode``: ``eager``, ``traced`` or ``fused``."""
    if mode != "auto":
        return "fused" if mode else "eager"
    return "fused" if steps >= FUSE_FIT_STEPS else "traced" if steps >= TRACE_FIT_STEPS else "eager"


def worth_a_block(numbers: int, steps: int) -> bool:
    """Whether a program with so many numbers among its inputs is to take blocks of the steps that are left."""
    return numbers <= BLOCK_NUMBERS and steps > BLOCK_STEPS


def worth_tracing(calls: int, mode: bool | str) -> bool:
    """Whether a potential is to be traced before so many calls."""
    return mode is True or (mode == "auto" and calls >= TRACE_POTENTIAL_CALLS)


def worth_fusing(
    calls: float, operations: int, mode: bool | str, nodes: int = 0, kept: bool = False, spent: float = 0.0
) -> bool:
    """Whether a potential is to be fused before so many calls: these are worth it, or earlier ones would have been.

    Args:
        calls: Calls ahead.
        operations: Operations of a call (:func:`operations_of`).
        mode: ``compile`` of the verb.
        nodes: Nodes of the graph; from ``FUSED_NODES`` on the cost of fusing is taken to grow with their square.
        kept: Whether the program is kept for later processes.
        spent: Operations that earlier runs of the process have computed without it. Whoever has spent what it costs
            is taken to go on: so much is lost at most by not having fused at once.
    """
    if mode != "auto":
        return mode is True
    cost = FUSE_POTENTIAL_OPERATIONS * max(1.0, (nodes / FUSED_NODES) ** 2)
    worth = calls * operations >= cost / (KEPT_USES if kept else 1) or spent >= cost
    return nodes <= MAX_FUSED_NODES and worth


def worth_a_piece(nodes: int, uses: int, calls: float) -> bool:
    """Whether a distinct piece, used so often in a call, is to be compiled before so many calls."""
    return PIECE_GAIN * nodes * uses * calls >= PIECE_SECONDS + PIECE_NODE_SECONDS * nodes


def operations_of(dispatched: int, numbers: int) -> int:
    """Operations of a call, with the numbers that it computes counted as the operations that take as long."""
    return dispatched + numbers // NUMBERS_PER_DISPATCH


def worth_processes(gradients: int, operations: int, workers: int) -> bool:
    """Whether chains run in so many processes: by the gradients of all chains, and operations of a run of the model.

    Compiled potentials count as they are: a few chains that are done in seconds may start workers.
    """
    ahead = gradients * (RUN_OPERATIONS * operations + GRADIENT_OVERHEAD)
    return ahead * (workers - 1) // workers >= PROCESS_OPERATIONS


def threads_for(numbers: int, chains: int, most: int) -> int:
    """Threads for a batched kernel of so many chains on data of so many numbers, at most so many."""
    return 1 if chains * numbers < SINGLE_THREAD_NUMBERS else most


def threads_of_fit(numbers: int, most: int) -> int:
    """Threads of a fit whose largest operation has so many numbers, at most so many."""
    return most if numbers >= THREADED_FIT_NUMBERS else 1


def draws_per_pass(numbers: int) -> int:
    """Draws that run at once, by the numbers of data that each reads."""
    return max(1, DRAW_NUMBERS // max(1, numbers))


def latents_per_pass(numbers: int) -> int:
    """Rows, or particles, that an evidence estimate takes at once, by the numbers of latents that each adds."""
    return max(1, LATENT_NUMBERS // numbers)
