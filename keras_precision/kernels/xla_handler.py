"""What XLA calls on a CPU to have functions of rows run: LLVM code of a handler that shares the rows among XLA's threads.

The handler is machine code through and through, so that no thread of XLA waits
for Python's lock. XLA's interface, `xla/ffi/api/c_api.h`, is one of plain
structures and stable within a major version; JAX documents it ("Foreign
function interface") and ships it with jaxlib.
"""

from __future__ import annotations

from typing import Any

from keras_precision.kernels.llvm_values import opaque
from keras_precision.kernels.row_function import Function

_ELEMENTS_OF_A_TURN = 32768  # what a thread takes on at once: about 30 us
_METADATA = 1  # the type of an extension of a call that asks for the version only
_MAJOR_VERSION = 0

# Places in structures, by their members' names. A member takes 8 bytes unless it is said otherwise.
_FRAME = {"extension": 8, "api": 16, "context": 24, "n_arguments": 56, "arguments": 72, "n_results": 96, "results": 112}
_EXTENSION = {"type": 8, "metadata": 24}  # type: 4 bytes
_METADATA_VERSION = {"major": 24, "minor": 28}  # 4 bytes each
_API = {"minor": 36, "destroy_error": 64, "schedule": 136, "n_threads": 144}  # minor: 4 bytes
_BUFFER = {"data": 24, "rank": 32, "dims": 40}
_SCHEDULE_SIZE, _N_THREADS_SIZE, _DESTROY_SIZE = 40, 32, 24

# Of what the threads that work on one call share; the pointers to its arrays' data follow.
_JOB = {"next_row": 0, "rows_done": 8, "holders": 16, "n_rows": 24}
_JOB_SIZE = 32


def write(module, rows, function: Function, name: str) -> Any:
    """Adds a handler to an LLVM module; returns it.

    Its first argument has rows of so many elements as the function's. Each of XLA's
    threads takes on some of them at a time, until none are left; the one that
    was called works too, so that none ever waits for another to begin.

    Args:
        module: llvmlite's.
        rows: LLVM function in it, as `row_code.write` adds them.
        function: what they do.
        name: of the handler.
    """
    return _Writer(module, rows, function).handler(name)


class _Writer:
    def __init__(self, module, rows, function):
        from llvmlite import ir

        self._ir, self._module, self._rows = ir, module, rows
        self._rows_of_a_turn = max(1, _ELEMENTS_OF_A_TURN // function.width)
        self._width_of_the_first = function.arguments[0].width
        self._i8, self._i32, self._i64, self._pointer = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.PointerType()
        self._null = ir.Constant(self._pointer, None)
        self._malloc = self._declared("malloc", self._pointer, [self._i64])
        self._free = self._declared("free", ir.VoidType(), [self._pointer])
        self._yield = self._declared("sched_yield", self._i32, [])
        self._work = self._written_work()
        self._release = self._written_release()
        self._task = self._written_task()

    def _declared(self, name, result, arguments):
        return self._ir.Function(self._module, self._ir.FunctionType(result, arguments), name)

    def _defined(self, name, result, arguments):
        function = self._declared(name, result, arguments)
        function.linkage = "internal"
        return function, self._ir.IRBuilder(function.append_basic_block("entry"))

    def _at(self, build, pointer, place):
        place = self._i64(place) if isinstance(place, int) else place
        return build.gep(pointer, [place], source_etype=self._i8)

    def _read(self, build, pointer, place, type_=None):
        return build.load(self._at(build, pointer, place), typ=type_ or self._pointer)

    def _put(self, build, value, pointer, place):
        build.store(value, self._at(build, pointer, place))

    def _added(self, build, job, member, number):
        """Adds to a number that threads share; returns what it was."""
        return build.atomic_rmw("add", self._at(build, job, _JOB[member]), number, "acq_rel")

    def _written_work(self):
        """A function of a job: works on its rows until none are left."""
        function, build = self._defined("work", self._ir.VoidType(), [self._pointer])
        (job,) = function.args
        turn, some, end = (function.append_basic_block(x) for x in ("turn", "some", "end"))
        n_rows = self._read(build, job, _JOB["n_rows"], self._i64)
        build.branch(turn)
        build.position_at_end(turn)
        start = self._added(build, job, "next_row", self._i64(self._rows_of_a_turn))
        build.cbranch(build.icmp_signed("<", start, n_rows), some, end)
        build.position_at_end(some)
        stop = build.add(start, self._i64(self._rows_of_a_turn))
        stop = build.select(build.icmp_signed("<", stop, n_rows), stop, n_rows)
        build.call(self._rows, [self._at(build, job, _JOB_SIZE), start, stop])
        self._added(build, job, "rows_done", build.sub(stop, start))
        build.branch(turn)
        build.position_at_end(end)
        build.ret_void()
        return function

    def _written_release(self):
        """A function of a job: frees it after the last of its holders."""
        function, build = self._defined("release", self._ir.VoidType(), [self._pointer])
        (job,) = function.args
        with build.if_then(build.icmp_signed("==", self._added(build, job, "holders", self._i64(-1)), self._i64(1))):
            build.call(self._free, [job])
        build.ret_void()
        return function

    def _written_task(self):
        """What a thread of XLA is given to do."""
        function, build = self._defined("task", self._ir.VoidType(), [self._pointer])
        (job,) = function.args
        build.call(self._work, [job])
        build.call(self._release, [job])
        build.ret_void()
        return function

    def handler(self, name):
        """Writes the function that XLA calls."""
        function = self._declared(name, self._pointer, [self._pointer])
        build = self._ir.IRBuilder(function.append_basic_block("entry"))
        (frame,) = function.args
        api = self._read(build, frame, _FRAME["api"])
        extension = self._read(build, frame, _FRAME["extension"])
        with build.if_then(build.icmp_unsigned("!=", extension, self._null)):
            kind = self._read(build, extension, _EXTENSION["type"], self._i32)
            with build.if_then(build.icmp_signed("==", kind, self._i32(_METADATA))):
                metadata = self._read(build, extension, _EXTENSION["metadata"])
                self._put(build, self._i32(_MAJOR_VERSION), metadata, _METADATA_VERSION["major"])
                minor = self._read(build, api, _API["minor"], self._i32)
                self._put(build, minor, metadata, _METADATA_VERSION["minor"])
                build.ret(self._null)
        job, n_rows = self._made_job(build, frame)
        self._shared(build, frame, api, job, n_rows)
        build.call(self._work, [job])
        # Only threads that have begun a turn are waited for.
        wait, ready = (function.append_basic_block(x) for x in ("wait", "ready"))
        build.branch(wait)
        build.position_at_end(wait)
        done = build.load_atomic(self._at(build, job, _JOB["rows_done"]), "acquire", 8, typ=self._i64)
        with build.if_then(build.icmp_signed("<", done, n_rows)):
            build.call(self._yield, [])
            build.branch(wait)
        build.branch(ready)
        build.position_at_end(ready)
        build.call(self._release, [job])
        build.ret(self._null)
        return function

    def _made_job(self, build, frame):
        n_arguments = self._read(build, frame, _FRAME["n_arguments"], self._i64)
        n_results = self._read(build, frame, _FRAME["n_results"], self._i64)
        arguments, results = (self._read(build, frame, _FRAME[x]) for x in ("arguments", "results"))
        n_rows = build.sdiv(self._size(build, self._read(build, arguments, 0)), self._i64(self._width_of_the_first))
        size = build.mul(build.add(n_arguments, n_results), self._i64(8))
        job = build.call(self._malloc, [build.add(size, self._i64(_JOB_SIZE))])
        for member, number in (("next_row", 0), ("rows_done", 0), ("holders", 1)):
            self._put(build, self._i64(number), job, _JOB[member])
        self._put(build, n_rows, job, _JOB["n_rows"])
        data = self._at(build, job, _JOB_SIZE)
        self._copied(build, arguments, n_arguments, data)
        self._copied(build, results, n_results, self._at(build, data, build.mul(n_arguments, self._i64(8))))
        return job, n_rows

    def _size(self, build, buffer):
        """Returns the number of a buffer's elements."""
        dims = self._read(build, buffer, _BUFFER["dims"])
        size = self._room(build, 8)
        build.store(self._i64(1), size)

        def multiply(i):
            length = self._read(build, dims, build.mul(i, self._i64(8)), self._i64)
            build.store(build.mul(build.load(size, typ=self._i64), length), size)

        self._repeated(build, self._read(build, buffer, _BUFFER["rank"], self._i64), multiply)
        return build.load(size, typ=self._i64)

    def _copied(self, build, buffers, count, to):
        """Copies the pointers to buffers' data."""

        def copy(i):
            place = build.mul(i, self._i64(8))
            self._put(build, self._read(build, self._read(build, buffers, place), _BUFFER["data"]), to, place)

        self._repeated(build, count, copy)

    def _shared(self, build, frame, api, job, n_rows):
        """Asks threads of XLA to work on a job: one fewer than it has turns at most."""
        context = self._read(build, frame, _FRAME["context"])
        count = self._room(build, 8)
        build.store(self._i64(1), count)
        request = self._request(build, _N_THREADS_SIZE, [context, count])
        self._destroyed(build, api, build.call(self._function(build, api, "n_threads"), [request]))
        turns = build.sdiv(build.add(n_rows, self._i64(self._rows_of_a_turn - 1)), self._i64(self._rows_of_a_turn))
        threads = build.load(count, typ=self._i64)
        helpers = build.sub(build.select(build.icmp_signed("<", turns, threads), turns, threads), self._i64(1))
        schedule = self._function(build, api, "schedule")
        request = self._request(build, _SCHEDULE_SIZE, [context, opaque(self._task), job])

        def ask(i):
            self._added(build, job, "holders", self._i64(1))
            error = build.call(schedule, [request])
            with build.if_then(build.icmp_unsigned("!=", error, self._null)):
                self._added(build, job, "holders", self._i64(-1))
            self._destroyed(build, api, error)

        self._repeated(build, helpers, ask)

    def _repeated(self, build, count, do):
        i64, before, function = self._i64, build.block, build.function
        head, body, end = (function.append_basic_block(x) for x in ("each", "one", "all"))
        build.branch(head)
        build.position_at_end(head)
        i = build.phi(i64)
        i.add_incoming(i64(0), before)
        build.cbranch(build.icmp_signed("<", i, count), body, end)
        build.position_at_end(body)
        do(i)
        i.add_incoming(build.add(i, i64(1)), build.block)
        build.branch(head)
        build.position_at_end(end)

    def _room(self, build, size):
        room = opaque(build.alloca(self._i8, size))
        room.align = 8
        return room

    def _request(self, build, size, members):
        """Returns the structure that a function of the interface is called with."""
        request = self._room(build, size)
        self._put(build, self._i64(size), request, 0)
        self._put(build, self._null, request, 8)
        for i, member in enumerate(members):
            self._put(build, member, request, 16 + 8 * i)
        return request

    def _function(self, build, api, name):
        """Returns a function of the interface, which returns an error or null."""
        return _Callee(self._read(build, api, _API[name]), self._ir.FunctionType(self._pointer, [self._pointer]))

    def _destroyed(self, build, api, error):
        """Forgets an error: what no other thread takes on, this one does."""
        with build.if_then(build.icmp_unsigned("!=", error, self._null)):
            request = self._request(build, _DESTROY_SIZE, [error])
            build.call(self._function(build, api, "destroy_error"), [request])


class _Callee:
    """An address with the type of the function there, which llvmlite calls it by."""

    def __init__(self, address, function_type):
        self.function_type, self.type, self.get_reference = function_type, address.type, address.get_reference
