import pytest

from real_data import real_data_environment

real_data_environment()  # before a test file looks for it while it is imported


def skipping_on_old_pytorch():
    "A test, or a fixture of one, that exports a network is skipped where PyTorch is too old to"
    try: return (yield)
    except ImportError as error:
        if not str(error).startswith('export_onnx needs PyTorch'): raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item): return (yield from skipping_on_old_pytorch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item): return (yield from skipping_on_old_pytorch())
