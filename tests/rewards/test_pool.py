import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jgrpo.config import MetricOptions
from jgrpo.rewards import RewardPool, make_reward
from model_port.errors import UserError

USER_REWARDS = '''
import logging
import os
import signal
import time


def share(completions, references, **_):
    """The process, and how many examples it was given at once."""
    return [os.getpid() + len(completions) / 1000] * len(completions)


def late(completions, references, *, seconds):
    time.sleep(max(seconds))
    return [len(text) for text in completions]


def fragile(completions, references, **_):
    return [1 / len(text) for text in completions]


def deadly(completions, references, **_):
    if "die" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)


def warns(completions, references, **_):
    logging.getLogger("jgrpo.rewards.rouge").warning("told by %d", os.getpid())
    return [os.getpid()] * len(completions)


def uses_jax(completions, references, **_):
    import jax

    return [float(jax.devices()[0].platform == "cpu" and jax.config.jax_platforms == "cpu")] * len(completions)
'''
SPEC = {"pool_rewards:fragile": 0.0, "bleu": 1.0, "chrf": 2.0, "wer": 0.5, "length": 1.0}
COMPLETIONS = [f"größer als {number}" + " wort" * (number % 4) for number in range(23)]
REFERENCES = [f"grösser als {number % 5} wort" for number in range(23)]


@pytest.fixture(scope="module")
def user_rewards(tmp_path_factory):
    """A module that the workers can import."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "pool_rewards.py").write_text(USER_REWARDS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    del sys.modules["pool_rewards"]


@pytest.fixture(scope="module")
def pools(user_rewards):
    spec = SPEC | {"pool_rewards:share": 0.0, "pool_rewards:uses_jax": 0.0}
    with RewardPool(spec, 0) as none, RewardPool(spec, 2) as two:
        yield {0: none, 2: two}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pool_computes_what_the_reward_does(pools, workers):
    pool = pools[workers]
    components = pool.submit(COMPLETIONS, REFERENCES).result()
    wanted = make_reward(SPEC).components(COMPLETIONS, REFERENCES)
    assert list(components) == list(pool.reward.names)
    for name in wanted:
        assert components[name].dtype == np.float64
        np.testing.assert_array_equal(components[name], wanted[name])
    total = pool.reward.total({**components, "pool_rewards:share": np.zeros(23)})
    np.testing.assert_array_equal(total, make_reward(SPEC).total(wanted))


def test_workers_share_the_examples_and_leave_the_device_alone(pools):
    components = pools[2].submit(COMPLETIONS, REFERENCES).result()
    shares = components["pool_rewards:share"]
    runs, sizes = np.unique(shares, return_counts=True)
    assert sorted(sizes) == [11, 12] and sorted(np.round(runs % 1 * 1000)) == [11, 12]
    assert len(np.unique(shares[:11])) == len(np.unique(shares[11:])) == 1
    assert os.getpid() not in shares.astype(int)
    assert components["pool_rewards:uses_jax"].all()
    here = pools[0].submit(COMPLETIONS, REFERENCES).result()["pool_rewards:share"]
    assert set(here) == {os.getpid() + 23 / 1000}


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_examples(pools, workers):
    for number in (0, 1, 2, 3):
        components = pools[workers].submit(COMPLETIONS[:number], REFERENCES[:number]).result()
        assert {values.shape for values in components.values()} == {(number,)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("index", [0, 4, 22])
def test_errors_name_the_example_by_its_number_among_all(pools, workers, index):
    completions = list(COMPLETIONS)
    completions[index] = ""
    failing = pools[workers].submit(completions, REFERENCES)
    next_one = pools[workers].submit(COMPLETIONS, REFERENCES)
    message = f"'pool_rewards:fragile' failed with ZeroDivisionError.* at example {index}: completion ''"
    with pytest.raises(UserError, match=message):
        failing.result()
    assert len(next_one.result()["bleu"]) == 23


def test_mistakes_are_told_where_they_are_made(pools):
    with pytest.raises(UserError, match="2 completions but 1 values in 'question'"):
        pools[2].submit(["a", "b"], ["a", "b"], {"question": ["q"]})
    with pytest.raises(UserError, match="workers are -1"):
        RewardPool("bleu", -1)
    with pytest.raises(UserError, match="'blue' is unknown"):
        RewardPool("blue", 2)


def test_scoring_does_not_hold_up_who_submits(user_rewards):
    columns = {"seconds": [0.3]}
    with RewardPool("pool_rewards:late", 0) as pool:
        start = time.perf_counter()
        first, second = pool.submit(["a"], ["a"], columns), pool.submit(["ab"], ["a"], columns)
        assert time.perf_counter() - start < 0.2 and not first.done()
        assert (first.result()["pool_rewards:late"], second.result()["pool_rewards:late"]) == ([1.0], [2.0])


def test_a_closed_pool_leaves_nothing_behind(user_rewards):
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    with pytest.raises(KeyError), RewardPool("pool_rewards:share", 1) as pool:
        pool.submit(["a"], ["a"])
        assert set(multiprocessing.active_children()) - children
        raise KeyError  # whatever happens in the run
    assert not set(threading.enumerate()) - threads
    assert not set(multiprocessing.active_children()) - children


def test_workers_do_not_outlive_a_killed_trainer(user_rewards, tmp_path):
    program = tmp_path / "trainer.py"
    program.write_text(
        "import os, signal\n"
        "from jgrpo.rewards import RewardPool\n"
        'if __name__ == "__main__":\n'
        '    pool = RewardPool("pool_rewards:share", 1)\n'
        '    print(int(pool.submit(["a"], ["a"]).result()["pool_rewards:share"][0]), flush=True)\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    worker = int(result.stdout)
    assert result.returncode == -signal.SIGKILL
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} still runs 10 s after its parent")


def alive(process):
    """Whether a process runs; one that ended and that nobody has asked after does not."""
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_dead_worker_is_an_error_and_no_hang(user_rewards):
    with RewardPool("pool_rewards:deadly", 1) as pool:
        assert pool.submit(["live"], ["a"]).result()["pool_rewards:deadly"] == [0.0]
        for completion in ("die", "live"):  # and the pool stays closed
            with pytest.raises(UserError, match="a reward worker process died: .*grpo.reward_workers to 0"):
                pool.submit([completion], ["a"]).result(timeout=60)


def test_what_needs_the_device_stays_here(monkeypatch):
    loaded = []

    def load(directory, layer):
        loaded.append(threading.current_thread().name)
        return lambda completions, references: [float(threading.current_thread().name.startswith("rewards"))]

    monkeypatch.setattr("jgrpo.rewards.bertscore.load_bertscore", load)
    with RewardPool({"bertscore": 1.0}, 2, options=MetricOptions(bertscore_model="a directory")) as pool:
        assert pool.submit(["a"], ["a"]).result()["bertscore"] == [1.0]
        assert pool._processes is None
    assert loaded == [threading.main_thread().name]


def test_a_warning_of_ours_comes_from_one_worker(user_rewards, capfd):
    workers, end = set(), time.monotonic() + 60
    with RewardPool("pool_rewards:warns", 2) as pool:
        while len(workers) < 2 and time.monotonic() < end:
            workers |= set(pool.submit(["a"] * 4, ["a"] * 4).result()["pool_rewards:warns"].astype(int))
    assert len(workers) == 2
    told = set(re.findall(r"told by (\d+)", capfd.readouterr().err))
    assert len(told) == 1 and int(told.pop()) in workers


def test_settings_of_workers_do_not_leak_into_this_process(pools):
    pools[2].submit(COMPLETIONS, REFERENCES).result()
    assert logging.getLogger("jgrpo").level == logging.NOTSET
    assert len(jax.devices()) == 8
