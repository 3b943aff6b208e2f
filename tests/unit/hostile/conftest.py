"""A time limit for every test, and the result of the intact checkpoint."""

import signal

import pytest

from tests import tiny
from tests.unit.hostile.samples import INTACT, SECONDS, load_and_run


class TooLate(BaseException):
    """Not an Exception, because code that catches these could take it for a damaged file."""


@pytest.fixture(autouse=True)
def time_limit():
    """10 seconds of work, and 20 times that by the clock, because the machine may be busy."""

    def stop(*args):
        raise TooLate

    old = [signal.signal(signal.SIGPROF, stop), signal.signal(signal.SIGALRM, stop)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(20 * SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    signal.signal(signal.SIGPROF, old[0])
    signal.signal(signal.SIGALRM, old[1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The result of the intact checkpoint."""
    return load_and_run(tiny.write(tmp_path_factory.mktemp("intact"), INTACT))
