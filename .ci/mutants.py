#!/usr/bin/env python3
"""Plant faults into copies of the two modules, one at a time, and list those that no test saw.

    make mutants                        # or: python3 .ci/mutants.py --faults 30 --only Quirks

A fault is a small change of the source: a comparison turned, a constant changed, a
statement dropped, a `not` added. The faults are made from the syntax tree and spread
over all sections (those under a ruler of `# ---`); the same seed plants the same ones.

First every test runs once over modules whose functions tell when they are entered, in
child processes too. For each fault the tests that enter its function then run first,
the most specific ones before the others, and after them all the rest; the first failure
ends the run. A run that hangs has seen the fault. Nothing but copies in a temporary
directory is touched.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = Path(tempfile.mkdtemp(prefix="mutants-"))        # the files as they were at the start
MODULES = ["openai_compat.py", "client.py"]
TESTS = "test_openai_compat.py"
COPIED = [*MODULES, TESTS, "README.md", "Makefile", ".pytest.ini", ".github"]

# Faults that change nothing that anybody could see: (the line, what it became, why).
EQUIVALENT = [
    ("context.minimum_version = ssl.TLSVersion.TLSv1_2", "pass",
     "Python 3.10 and newer refuse TLS 1.1 themselves; on 3.8 a test sees it"),
    ("batch = WRITES_PER_SEND if response.ready else 1",
     "batch = WRITES_PER_SEND if response.ready else 0",
     "a send of what is pending is due after 1 write as after 0"),
    ("WRITES_PER_SEND = 1             # how many share a send, if none must be waited for",
     "WRITES_PER_SEND = 0             # how many share a send, if none must be waited for",
     "stands where FAST is False, and 1 write is as good as 0"),
    ("return 0                    # it ended as it was told to; what failed was printed",
     "return None                    # it ended as it was told to; what failed was printed",
     "sys.exit(None) is status 0"),
    ("return 0  # the server does not say", "return -1  # the server does not say",
     "no wait is as good as one that is over"),
]


def copy_files(origin, target):
    for name in COPIED:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, target / name)
        else:
            shutil.copy(origin / name, target)


# ----------------------------------------------------------------------------------
# Faults.  Each one is a piece of the source's text and what stands in its place.

Fault = collections.namedtuple("Fault", "file kind start end text")     # offsets into the text

COMPARISONS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="),
               ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
               ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"),
               ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in")}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"),
              ast.FloorDiv: ("//", "*"), ast.Div: ("/", "*"), ast.Mod: ("%", "*")}
DROPPED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Break, ast.Continue, ast.Delete, ast.Assign)


class Source:
    """A module's text, its tree, and where in the text each node stands."""

    def __init__(self, name):
        self.name, self.text = name, (BASE / name).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.enclosing = {}             # node -> the function that it stands in
        self.docstrings = set()
        self._look(self.tree, None)
        self.sections = self._sections()

    def _look(self, node, function):
        self.enclosing[node] = function
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            self.docstrings.add(node.body[0].value)
        if isinstance(node, ast.FunctionDef):
            function = node
        for child in ast.iter_child_nodes(node):
            self._look(child, function)

    def _sections(self):
        """[(first line, title)], by the rulers."""
        found = [(0, "Top")]
        for number, line in enumerate(self.lines):
            if re.match(r"# (---|===)", line) and number + 1 < len(self.lines):
                title = re.match(r"#\s*([^.:\n]*)", self.lines[number + 1])
                found.append((number, title[1].strip() if title else ""))
        return found

    def offset(self, line, column):
        """The place in the text of a line and of a column, which counts bytes."""
        return self.starts[line - 1] + len(
            self.lines[line - 1].encode("utf-8")[:column].decode("utf-8"))

    def span(self, node):
        return (self.offset(node.lineno, node.col_offset),
                self.offset(node.end_lineno, node.end_col_offset))

    def section_of(self, offset):
        line = self.text.count("\n", 0, offset)
        return [title for start, title in self.sections if start <= line][-1]

    def operator(self, left, right, pattern, new):
        """(start, end, new text) of the operator between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = re.search(pattern, self.text[start:end])
        return found and (start + found.start(), start + found.end(), new)


def changes(source, node):
    """(kind, start, end, text) for all that may be done to one node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        old, new = COMPARISONS[type(node.ops[0])]
        found = source.operator(node.left, node.comparators[0], old, new)
        yield found and ("comparison", *found)
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        found = source.operator(node.values[0], node.values[1], rf"\b{old}\b", new)
        yield found and ("and/or", *found)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not is_text(node):
        old, new = ARITHMETIC[type(node.op)]
        found = source.operator(node.left, node.right, re.escape(old), new)
        yield found and ("arithmetic", *found)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        start, end = source.span(node)
        yield "not dropped", start, source.span(node.operand)[0], ""
    elif isinstance(node, ast.Constant):
        yield from constants(source, node)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        start, end = source.span(node.test)
        yield "not added", start, end, f"not ({source.text[start:end]})"
    if isinstance(node, DROPPED) and not droppable_never(source, node):
        yield ("dropped", *source.span(node), "pass")
    if isinstance(node, ast.Return) and node.value is not None:
        yield ("returns nothing", *source.span(node), "return None")


def is_text(node):
    """Is one side of an operator a text?  Then a turned one is only a TypeError."""
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), (
        str, bytes)) for side in (node.left, node.right))


def droppable_never(source, node):
    """Without an assignment most functions only fail by a NameError: no fault worth it."""
    if isinstance(node, ast.Assign):
        return not all(isinstance(target, (ast.Attribute, ast.Subscript))
                       for target in node.targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def constants(source, node):
    start, end = source.span(node)
    value = node.value
    if value is True or value is False:
        yield "constant", start, end, str(not value)
    elif isinstance(value, int):
        yield "constant", start, end, str(value + 1)
        yield "constant", start, end, str(value - 1) if value else "-1"
    elif isinstance(value, float) and value:
        yield "constant", start, end, repr(value * 2)
    elif isinstance(value, (str, bytes)) and 0 < len(value) < 20:
        text = source.text[start:end]
        if re.fullmatch(r"""b?(["'])[\w./:-]+\1""", text):      # a name, not a sentence
            yield "constant", start, end, text[:-1] + "x" + text[-1]


def faults_of(source):
    """Every fault of a module that leaves it a program, and another one."""
    hidden = set(source.docstrings)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.JoinedStr) or is_switch(node):
            hidden.update(ast.walk(node))
    for node in ast.walk(source.tree):
        if node not in hidden and hasattr(node, "lineno"):
            for kind, start, end, text in filter(None, changes(source, node)):
                yield Fault(source.name, kind, start, end, text), node


def is_switch(node):
    """`__all__`, a version, and the test for running as a script: nobody plants there."""
    return isinstance(node, ast.Assign) and re.match("__", getattr(node.targets[0], "id", "")) \
        or isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


def planted(source, fault):
    return source.text[:fault.start] + fault.text + source.text[fault.end:]


def is_program(source, fault):
    """Can the statement at the top of which the fault stands still be read?"""
    start, end = next(span for span in map(source.span, source.tree.body)
                      if span[0] <= fault.start <= span[1])
    try:
        ast.parse(source.text[start:fault.start] + fault.text + source.text[fault.end:end])
    except (SyntaxError, ValueError):
        return False
    return True


def chosen(sources, count, seed, only):
    """About `count` faults, of each section as many as it has its share of."""
    by_section = collections.defaultdict(list)
    for source in sources:
        for fault, node in faults_of(source):
            title = f"{source.name[:-3]}: {source.section_of(fault.start)}"
            if re.search(only, title, re.IGNORECASE):
                by_section[title].append((fault, node))
    weight = {title: math.sqrt(len(faults)) * math.log(len(faults) + 1)
              for title, faults in by_section.items()}
    total, picked = sum(weight.values()), []
    for title, faults in by_section.items():
        dice, share = random.Random(f"{seed} {title}"), max(2, round(count * weight[title] / total))
        picked += [(title, *each) for each in spread(sources, faults, share, dice)]
    return picked


def spread(sources, faults, count, dice):
    """A few faults of a section: of all kinds, and hardly two on one line."""
    source = {source.name: source for source in sources}
    kinds, lines, picked = collections.Counter(), set(), []
    pool = dice.sample(faults, len(faults))
    while pool and len(picked) < count:
        fault, node = min(pool[:200], key=lambda each: (
            (each[0].file, each[1].lineno) in lines, kinds[each[0].kind]))
        pool.remove((fault, node))
        if is_program(source[fault.file], fault):
            kinds[fault.kind] += 1
            lines.add((fault.file, node.lineno))
            picked.append((fault, node))
    return picked


# ----------------------------------------------------------------------------------
# Which tests come near a function.  In a copy each function says once a test that it was
# entered, by its number, in a file that the environment names: child processes tell too.

HIT = """
import os as _os
_entered = {}
def _hit(number):
    place = _os.environ.get("MUTANTS_HITS")
    if place and number not in _entered.setdefault(place, set()):
        _entered[place].add(number)
        try:
            with open(place, "a") as file:
                file.write(number + "\\n")
        except OSError:             # a test that fills the disk
            pass
"""
PLUGIN = """
import json, os, pytest
work = os.environ["MUTANTS_WORK"]
order = json.load(open(os.path.join(work, "order.json")))
hits = os.path.join(work, "hits")
told, number_of = {}, {}
if os.path.isdir(hits):
    os.environ["MUTANTS_HITS"] = os.path.join(hits, "import")

def pytest_collection_modifyitems(config, items):
    number_of.update({item.nodeid: number for number, item in enumerate(items)})
    json.dump([item.nodeid for item in items], open(os.path.join(work, "names.json"), "w"))
    chosen = range(len(items)) if order is None else order
    items[:] = [items[number] for number in chosen if number < len(items)]

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if os.path.isdir(hits):
        os.environ["MUTANTS_HITS"] = os.path.join(hits, str(number_of[item.nodeid]))

def pytest_runtest_logreport(report):
    seconds, passed = told.get(report.nodeid, (0, True))
    told[report.nodeid] = seconds + report.duration, passed and not report.failed
    open(os.path.join(work, "beat"), "w").close()

def pytest_sessionfinish():
    json.dump({number_of[name]: each for name, each in told.items()},
              open(os.path.join(work, "told.json"), "w"))
"""


def numbers_of(source):
    """{function: its number}."""
    functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
    return {function: f"{source.name}:{number}" for number, function in enumerate(functions)}


def telling(source):
    """The text of a module whose functions tell when they are entered."""
    text = source.text
    for function, number in sorted(numbers_of(source).items(), key=lambda each: -each[0].lineno):
        body = [node for node in function.body if getattr(node, "value", None) not in source.docstrings]
        if body:
            first = min([body[0].lineno, *(each.lineno for each in getattr(
                body[0], "decorator_list", ()))])
            start = source.offset(first, 0)
            indent = re.match(r"[ \t]*", source.lines[first - 1])[0]
            if first == function.lineno:            # def f(): return x
                text = insert(text, source.span(body[0])[0], f"_hit('{number}'); ")
            else:
                text = insert(text, start, f"{indent}_hit('{number}')\n")
    first = next(node for node in source.tree.body if getattr(node, "value", None)
                 not in source.docstrings and getattr(node, "module", None) != "__future__")
    return insert(text, source.offset(first.lineno, 0), HIT)


def insert(text, place, more):
    return text[:place] + more + text[place:]


def identifiers(node):
    return {getattr(each, "id", None) or getattr(each, "attr", None) for each in ast.walk(node)
            if isinstance(each, (ast.Name, ast.Attribute))}


def readers_of(source, node):
    """The functions that use what a fault changes when the module is imported.

    A table is used by who names it, or names what is made from it.
    """
    function, names = source.enclosing[node], set()
    if function:
        names.add(function.name)
    for statement in ast.walk(source.tree):
        if statement in source.enclosing and source.enclosing[statement] is None and isinstance(
                statement, (ast.Assign, ast.AugAssign, ast.ClassDef, ast.AnnAssign)) and any(
                    each is node for each in ast.walk(statement)):
            names |= identifiers(statement) if not isinstance(statement, ast.ClassDef) else {
                statement.name}
            names |= {getattr(target, "id", "") for target in getattr(statement, "targets", ())}
    for _ in range(3):
        for statement in source.tree.body:
            if isinstance(statement, ast.Assign) and identifiers(statement.value) & names:
                names |= {getattr(target, "id", "") for target in statement.targets}
    return [each for each in numbers_of(source) if identifiers(each) & names]


class Map:
    """What a run over the telling copies has told: who enters what, how long, what fails."""

    def __init__(self, sources, jobs):
        self.numbers = {function: number for source in sources
                        for function, number in numbers_of(source).items()}
        texts = {source.name: telling(source) for source in sources}
        with tempfile.TemporaryDirectory() as folder:
            parts = [Path(folder) / str(part) for part in range(jobs)]
            self.names = self._collected(texts, Path(folder) / "names")
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda part: self._run(texts, part, jobs), parts))
            self._read(parts)

    def _collected(self, texts, folder):
        run(folder, texts, None, "--collect-only")
        return json.loads((folder / "names.json").read_text())

    def _run(self, texts, folder, jobs):
        (folder / "hits").mkdir(parents=True)
        part = range(int(folder.name), len(self.names), jobs)
        run(folder, texts, list(part), whole=True)

    def _read(self, parts):
        self.seconds, self.red = {}, []
        self.entered = collections.defaultdict(set)         # function's number -> tests
        for folder in parts:
            told = json.loads((folder / "told.json").read_text())
            for number, (seconds, passed) in told.items():
                self.seconds[int(number)] = seconds
                self.red += [] if passed else [int(number)]
            for file in (folder / "hits").iterdir():
                for line in file.read_text().split():
                    if file.name != "import":
                        self.entered[line].add(int(file.name))
        self.breadth = collections.Counter(
            test for tests in self.entered.values() for test in tests)
        self.words = [words_in(name.partition("::")[2]) for name in self.names]
        self.common = collections.Counter(word for words in self.words for word in words)

    def order(self, source, fault, node):
        """(the tests near a fault, those that never come near), each nearest first."""
        function = source.enclosing[node]
        near = set(self.entered.get(self.numbers.get(function), ()))
        for each in readers_of(source, node):
            near |= self.entered.get(self.numbers[each], set())
        near -= set(self.red)
        first = self._by_words(near, words_near(source, fault, function))
        later = sorted(near - set(first), key=self._cost)
        return first + later, sorted(set(self.seconds) - near - set(self.red), key=self._cost)

    def _by_words(self, tests, words, most=40):
        """The tests whose names share the rarest words with the place of the fault."""
        score = {test: sum(1 / self.common[word] for word in words & self.words[test])
                 for test in tests}
        best = sorted((test for test in tests if score[test]),
                      key=lambda test: (-score[test], self._cost(test)))
        return best[:most]

    def _cost(self, test):
        return self.seconds[test] * 20 + self.breadth[test], test


def words_in(text):
    return {word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())}


def words_near(source, fault, function):
    """The words of a fault's line, function and section."""
    line = source.text.count("\n", 0, fault.start)
    return words_in(" ".join([source.lines[line], source.section_of(fault.start),
                              function.name if function else ""]))


# ----------------------------------------------------------------------------------
# Running the tests over a copy.

def limited():
    """A fault may eat memory: let it fail in its own process."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def run(folder, texts, order, *words, whole=False):
    """("seen", "unseen" or "hung", the test that failed) of these tests over a copy."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    copy_files(BASE, copy)
    for name, text in texts.items():
        (copy / name).write_text(text, encoding="utf-8")
    (folder / "order.json").write_text(json.dumps(order))
    (folder / "mutants_plugin.py").write_text(PLUGIN)
    environment = {**os.environ, "MUTANTS_WORK": str(folder), "PYTHONPATH": str(folder),
                   "PYTHONDONTWRITEBYTECODE": "1", "FUZZ_SEED": "1", "PATIENCE": "10"}
    words = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider",
             "-p", "mutants_plugin", *([] if whole else ["-x"]), *words, TESTS]
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(words, cwd=copy, env=environment, stdout=said, stderr=said,
                                   stdin=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=limited)
    status = ended(process, folder / "beat")
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)          # what a cut test has left
    failed = re.search(r"FAILED \S+?::(.*?)(?: - |\n)", (folder / "said").read_text(errors="replace"))
    return ("hung" if status is None else "unseen" if status in (0, 5) else "seen",
            failed[1] if failed else "")


def ended(process, beat, silence=90):
    """The status of a run; None where no test ended for so many seconds."""
    last = time.time()
    while time.time() - last < silence:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(2)
        with contextlib.suppress(OSError):
            last = beat.stat().st_mtime
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)           # lets the fixtures end theirs
        process.wait(15)
    return None


def tried(source, fault, node, near_first, deadline):
    """Does a test see the fault?  First those near it, then all the others."""
    texts = {fault.file: planted(source, fault)}
    for tests in near_first.order(source, fault, node):
        if tests and time.monotonic() < deadline:
            with tempfile.TemporaryDirectory() as folder:
                found = run(Path(folder), texts, tests)
                if found[0] != "unseen":
                    return found
        elif tests:
            return "not run", ""
    return "unseen", ""


# ----------------------------------------------------------------------------------
# The report.

def shown(source, fault):
    """The fault as a diff of whole lines."""
    before, after = (text.splitlines() for text in (source.text, planted(source, fault)))
    return [line for line in difflib.unified_diff(before, after, n=0, lineterm="")
            if not line.startswith(("---", "+++", "@@"))]


def reason(source, fault):
    """Why nobody can see it, if that is known."""
    diff = shown(source, fault)
    gone = [line[1:].strip() for line in diff if line.startswith("-")]
    come = [line[1:].strip() for line in diff if line.startswith("+")]
    for before, after, why in EQUIVALENT:
        if gone == before.split("\n") and come == after.split("\n"):
            return why
    return None


def table(results):
    """{section: Counter of outcomes} as lines."""
    sections = collections.defaultdict(collections.Counter)
    for title, outcome in results:
        sections[title][outcome] += 1
        sections["all"][outcome] += 1
    sections["all"] = sections.pop("all")
    columns = ["planted", "seen", "hung", "unseen", "equivalent", "not run"]
    yield f"{'section':<44}" + "".join(f"{column:>11}" for column in columns)
    for title, counter in sections.items():
        numbers = [sum(counter.values()), *(counter[column] for column in columns[1:])]
        yield f"{title[:43]:<44}" + "".join(f"{number:>11}" for number in numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=150, help="about how many (150)")
    parser.add_argument("--seed", default="1", help="another seed, other faults")
    parser.add_argument("--only", default="", help="sections whose title matches this")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time (2)")
    parser.add_argument("--minutes", type=float, default=20, help="stop after (20)")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    args = parser.parse_args()
    copy_files(ROOT, BASE)
    sources = {name: Source(name) for name in MODULES}
    faults = chosen([*sources.values()], args.faults, args.seed, args.only)
    if args.list:
        for title, fault, node in faults:
            print(f"{fault.file}:{node.lineno} ({title}, {fault.kind})",
                  *shown(sources[fault.file], fault), sep="\n    ")
        return 0
    started = time.monotonic()
    print(f"{len(faults)} faults; first every test once, to see which come near which function",
          flush=True)
    near_first = Map([*sources.values()], args.jobs)
    print(f"{len(near_first.names)} tests in {time.monotonic() - started:.0f} s"
          + "".join(f"\nfails without a fault, and is left out: {near_first.names[test]}"
                    for test in near_first.red), flush=True)
    return report(sources, faults, near_first, args, started)


def report(sources, faults, near_first, args, started):
    results, unseen = [], []
    deadline = started + 60 * args.minutes

    def attempt(planting):
        _, fault, node = planting
        begun, source = time.monotonic(), sources[fault.file]
        outcome, test = ("equivalent", "") if reason(source, fault) else tried(
            source, fault, node, near_first, deadline)
        print(f"{outcome:>10} {time.monotonic() - begun:5.1f} s  {fault.file}:{node.lineno} "
              f"{fault.kind:<16} {test[:90]}", flush=True)
        return outcome

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for planting, outcome in zip(faults, pool.map(attempt, faults)):
            results.append((planting[0], outcome))
            unseen += [planting] if outcome == "unseen" else []
    print()
    for title, fault, node in unseen:
        print(f"unseen: {fault.file}:{node.lineno} ({title})",
              *shown(sources[fault.file], fault), "", sep="\n    ")
    print(*table(results), sep="\n")
    tally = collections.Counter(outcome for _, outcome in results)
    counted = tally["seen"] + tally["hung"] + tally["unseen"]
    share = 100 * (tally["seen"] + tally["hung"]) / max(counted, 1)
    print(f"\n{share:.1f} % of {counted} faults that change something were seen, "
          f"in {time.monotonic() - started:.0f} s, seed {args.seed}")
    return 0 if share >= 95 and not tally["not run"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(BASE)
