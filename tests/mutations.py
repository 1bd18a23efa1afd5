"""A campaign of planted errors: python tests/mutations.py --count 200 --seed 0 --log mutations_log.jsonl.

One small error at a time is planted in a copy of the library: a comparison, an operator or a number changed, a
condition turned, a statement left out. The tests that run that line, the quickest first, should fail. The first run
records which those are, which takes as long as the suite; a campaign that was stopped goes on where it was.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
from coverage import CoverageData
from kills import of_session
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 300  # seconds of tests, as measured without an error, for each error
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
LEFT_ALONE = (ast.FunctionDef, ast.ClassDef, ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutation:
    """`before`, of a line of a file, becomes `after`."""

    file: str
    line: int
    start: int  # bytes from the beginning of the file
    before: str
    after: str


def changed(node: ast.AST) -> ast.AST | None:
    """What becomes of a node: another one, or None if it stays."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        return ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        return ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(SWAPS[type(node.op)](), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.IfExp):
        return ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return ast.Pass()
    return None


def is_strict(node: ast.AST) -> bool:
    """Whether it is zip's `strict=True`, of which nothing depends as long as lengths are equal."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def within_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of functions' bodies: no annotations, defaults, docstrings, or what is said when something is wrong."""
    waiting = [node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in f.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, LEFT_ALONE):
            continue
        yield node
        waiting += [
            child for name, value in ast.iter_fields(node) if name != "annotation" and not is_strict(node)
            for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)
        ]  # fmt: skip


def mutations(file: Path) -> list[Mutation]:
    """All that can be planted in a file."""
    text = file.read_bytes()
    starts = [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for node in within_functions(ast.parse(text)):
        new = changed(node)
        if new is None or not isinstance(node, ast.expr | ast.stmt) or node.end_lineno is None:
            continue
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + (node.end_col_offset or 0)
        after = ast.unparse(ast.fix_missing_locations(new))
        after = f"({after})" if isinstance(new, ast.expr) else after
        name = str(file.relative_to(ROOT))
        found.append(Mutation(name, node.lineno, start, text[start:end].decode(), after))
    return found


def pytest_configure(config: pytest.Config) -> None:
    """While a test runs, each Python that it starts records what it runs, too: see `record`."""
    if hasattr(config, "workerinput"):
        os.environ["COVERAGE_PROCESS_START"] = os.environ["MUTATIONS_COVERAGE"]


def record(folder: Path) -> None:
    """Run the suite once: which tests run which lines, in processes that they start too, and how long they take."""
    settings = folder / "settings.ini"
    of_test = "context = ${PYTEST_CURRENT_TEST-}"
    settings.write_text(f"[run]\nsource = biper\nparallel = true\ndata_file = {folder / 'coverage'}\n{of_test}\n")
    flags = ["--numprocesses=3", "--dist=worksteal", "--cov=biper", "--cov-context=test", "--cov-report="]
    flags += [f"--cov-config={settings}", "-p", "mutations", f"--junitxml={folder / 'times.xml'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {"MUTATIONS_COVERAGE": str(settings), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags]
    ended = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if ended.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # of those `is_found` leaves out
        (folder / "times.xml").unlink(missing_ok=True)
        sys.exit(f"error: the suite could not be recorded: pytest ended with {ended.returncode}")


def covering(folder: Path) -> tuple[dict[tuple[str, int], list[str]], dict[str, float]]:
    """The tests of each line by file and number, and the seconds of each test, as `record` has found them."""
    data = CoverageData(str(folder / "coverage"))
    data.read()
    tests = defaultdict(list)
    for file in data.measured_files():
        for line, contexts in data.contexts_by_lineno(file).items():
            names = {re.sub(r"(\|\w+| \(\w+\))$", "", context) for context in contexts if "::" in context}
            tests[os.path.relpath(file, ROOT), line] = sorted(names)
    seconds = {}
    for case in ElementTree.parse(folder / "times.xml").getroot().iter("testcase"):
        seconds[_name(case)] = float(case.get("time", 0))
    return tests, seconds


def tests_of(mutation: Mutation, tests: dict[tuple[str, int], list[str]]) -> list[str]:
    """Those that run its line or, as a statement may have several, one shortly before; else all of its file."""
    for line in range(mutation.line, max(0, mutation.line - 5), -1):
        if tests.get((mutation.file, line)):
            return tests[mutation.file, line]
    return sorted({name for (file, _), names in tests.items() if file == mutation.file for name in names})


def failing(copy: Path, tests: list[str]) -> str | None:
    """The first of the tests that fails in a copy of the repository, "" if none can be named; None if all pass."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    report = copy / "mutations_report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", f"--junitxml={report}", *tests]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=copy, env=environment, **streams)
    try:
        status = process.wait(60 + 4 * BUDGET)
    except subprocess.TimeoutExpired:
        return ""
    finally:
        for pid in of_session(process.pid):  # what tests have started too
            os.kill(pid, signal.SIGKILL)
        process.wait()
    whole = sorted({test.split("[")[0] for test in tests})
    if status == pytest.ExitCode.USAGE_ERROR and whole != tests:  # a name that depends on what else is collected
        return failing(copy, whole)
    if not status:
        return None
    cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ()
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    named = [_name(case) for case in wrong if "." in case.get("classname", "")]  # one that could not be read has none
    return named[0] if named else ""


def _name(case: ElementTree.Element) -> str:
    """A test as pytest takes it, from its entry in a report: file, then class if it is in one, then function."""
    room, file, *classes = case.get("classname", "").split(".")
    return "::".join([f"{room}/{file}.py", *classes, case.get("name", "")])


def is_found(
    mutation: Mutation, copy: Path, tests: list[str], seconds: dict[str, float], sound: dict[str, bool]
) -> bool:
    """Whether a test fails with the error planted in a copy of the repository, and passes without it.

    sound: of tests that have failed, whether they pass without any error, as far as that is known.
    """
    file = copy / mutation.file
    whole = file.read_bytes()
    end = mutation.start + len(mutation.before.encode())
    planted = whole[: mutation.start] + mutation.after.encode() + whole[end:]
    while chosen := within_budget([test for test in tests if sound.get(test, True)], seconds):
        file.write_bytes(planted)
        try:
            failed = failing(copy, chosen)
        finally:
            file.write_bytes(whole)
        if failed is None:
            return False
        if failed not in chosen:  # it hung, or nothing could even be collected
            return failing(copy, chosen) is None
        if failed not in sound:
            sound[failed] = failing(copy, [failed]) is None
        if sound[failed]:
            return True
    return False


def within_budget(tests: list[str], seconds: dict[str, float]) -> list[str]:
    """The quickest of the tests, as many as there is time for."""
    chosen, total = [], 0.0
    for test in sorted(tests, key=lambda name: seconds.get(name, 1.0)):
        total += seconds.get(test, 1.0)
        if chosen and total > BUDGET:
            break
        chosen.append(test)
    return chosen


def campaign(count: int, seed: int, log: Path, folder: Path, jobs: int) -> list[dict[str, object]]:
    """Plant errors, `jobs` at a time, and log for each whether it was found."""
    tests, seconds = covering(folder)
    everything = [m for file in sorted((ROOT / "biper").rglob("*.py")) for m in mutations(file)]
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(entry["file"], entry["start"], entry["after"]) for entry in done}
    chosen = random.Random(seed).sample(everything, count)
    waiting = [m for m in chosen if (m.file, m.start, m.after) not in known]
    copies: SimpleQueue[Path] = SimpleQueue()  # of the repository, that no error is planted in
    sound: dict[str, bool] = {}

    def plant(mutation: Mutation) -> dict[str, object]:
        copy = copies.get()
        try:
            found = is_found(mutation, copy, tests_of(mutation, tests), seconds, sound)
            return asdict(mutation) | {"found": found}
        finally:
            copies.put(copy)

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as threads:
        for number in range(jobs):
            copies.put(Path(place) / f"copy{number}")
            ignored = shutil.ignore_patterns(".venv", "results", "test_matrix", "mutations_*", "__pycache__")
            shutil.copytree(ROOT, Path(place) / f"copy{number}", ignore=ignored)
        ended = as_completed([threads.submit(plant, mutation) for mutation in waiting])
        try:
            for future in tqdm(ended, initial=len(done), total=count, disable=None):
                done.append(future.result())
                with log.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        finally:
            threads.shutdown(cancel_futures=True)
    return done


def main() -> None:
    """Print a table by room, and the errors that no test has found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="default 200")
    parser.add_argument("--seed", type=int, default=0, help="of the choice; default 0")
    parser.add_argument("--jobs", type=int, default=2, help="errors planted at a time, each in a copy; default 2")
    parser.add_argument("--log", type=Path, default=Path("mutations_log.jsonl"), help="default mutations_log.jsonl")
    parser.add_argument("--map", type=Path, default=Path("mutations_map"), help="what the first run has recorded")
    args = parser.parse_args()
    if not (args.map / "times.xml").exists():
        args.map.mkdir(exist_ok=True)
        record(args.map.resolve())
    done = campaign(args.count, args.seed, args.log, args.map, args.jobs)
    planted = Counter(Path(str(m["file"])).parts[1] for m in done)
    found = Counter(Path(str(m["file"])).parts[1] for m in done if m["found"])
    print("| room | planted | found |\n| --- | --- | --- |")
    for room in sorted(planted):
        print(f"| {room} | {planted[room]} | {found[room]} |")
    print(f"| all | {len(done)} | {found.total()} ({found.total() / len(done):.0%}) |\n")
    for m in done:
        if not m["found"]:
            print(f"{m['file']}:{m['line']}: {m['before']!r} became {m['after']!r}")


if __name__ == "__main__":
    main()
