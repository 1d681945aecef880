"""The README's tests and somebody's application: a section of test_openai_compat.py."""
import array
import ast
import base64
import configparser
import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import client
import openai_compat
from openai_compat import QUIRKS, Relay, Replay, Reply, Script, Server, ToolCall

HERE = Path(openai_compat.__file__).resolve().parent

# ==================================================================================
# THE README: what it says is run

# ----------------------------------------------------------------------------------
# The blocks of the README.  A block after a paragraph that ends with a `file` and a colon
# is that file.  In a transcript … is what is left out: within a line any text, on a line
# of its own any lines.

README = (HERE / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", README, re.MULTILINE))


def blocks_of_the_readme():
    """(section, language, text, the paragraph before it) of each block."""
    found = []
    for section, words in SECTIONS.items():
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", words, re.MULTILINE | re.DOTALL):
            before = words[:match.start()].rstrip("\n").rpartition("\n\n")[2]
            found.append((section, match[1], match[2], before))
    first = README[:README.index("\n## ")]
    return [("", language, text, "") for language, text in
            re.findall(r"^```(\w+)\n(.*?)^```$", first, re.MULTILINE | re.DOTALL)] + found


def file_of(paragraph):
    """The name of the file that a paragraph announces, or None."""
    named = re.findall(r"`(\w+\.\w+)`(?:, for\s`[^`]*`| of [\w ]+)?:$", paragraph)
    return named[0] if named else None


BLOCKS = blocks_of_the_readme()
FILES = {file_of(before): text for _, _, text, before in BLOCKS if file_of(before)}
CONFTESTS = [text for _, _, text, before in BLOCKS
             if "def server" in text and "def test_" not in text]


def block(language, containing):
    """The text of the one block of a language in which something stands."""
    found = [text for _, kind, text, _ in BLOCKS if kind == language and containing in text]
    assert len(found) == 1, (language, containing, len(found))
    return found[0]


def transcript(text):
    """[command, what it prints] of a console block; four spaces continue a command."""
    commands = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append([line[2:], ""])
        elif line.startswith("    ") and not commands[-1][1]:
            commands[-1][0] += "\n" + line
        else:
            commands[-1][1] += line + "\n"
    return commands


def pattern(expected):
    """A regular expression for what a transcript shows."""
    return "".join(r"(?:.*\n)*?" if line == "…" else
                   ".*".join(map(re.escape, without_times(line).split("…"))) + r"\n"
                   for line in expected.splitlines())


def without_times(text):
    return re.sub(r"\d\d:\d\d:\d\d\.\d\d\d", "00:00:00.000", text)


# ----------------------------------------------------------------------------------
# The desk is where they are run: the two files, those that the README shows, and
# `python3` for the Python of this test.

# As much of some packages and programs as the README's recipes touch.
STUBS = {
    "tiktoken.py": '''
class Encoding:
    def __init__(self, name, mergeable_ranks, special_tokens, pat_str):
        self.ranks = mergeable_ranks
    def encode(self, text, disallowed_special):
        return [self.ranks[bytes([byte])] for byte in text.encode()]
    def decode_with_offsets(self, tokens):
        text, starts = bytes(tokens).decode(), []
        for i, character in enumerate(text):
            starts += [i] * len(character.encode())
        return text, starts
''',
    "ranks.tiktoken": "".join("%s %d\n" % (base64.b64encode(bytes([i])).decode(), i)
                              for i in range(256)),
    # An application that runs as a process of its own, and answers over HTTP.
    "app.py": '''
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from client import Client

class Application(BaseHTTPRequestHandler):
    def do_GET(self):
        reply = Client().chat_completions(self.path, model="any")
        self.wfile.write(reply["choices"][0]["message"]["content"].encode())

HTTPServer(("127.0.0.1", int(os.environ["APP_PORT"])), Application).serve_forever()
''',
}
PROGRAMS = {
    "python3": 'exec "%s" "$@"' % sys.executable,
    "npm": 'for ask in 1 2 "3 --temperature 0"; do python3 client.py chat $ask || exit; done',
    "llama-cli": 'shift 4; printf %s "$1"',     # says the prompt, which is the 5th argument
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("openai_compat.py", "client.py"):
        shutil.copy(str(HERE / name), str(folder))
    for name, text in {**FILES, **STUBS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "conftest.py").unlink()
    (folder / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text("#!/bin/sh\n%s\n" % text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def surroundings(folder, **more):
    """The environment of a newcomer, who has set nothing."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "PYTEST_", "PYTHON"))
            and "proxy" not in name.lower()}
    path = "%s%s%s" % (folder / "bin", os.pathsep, os.environ["PATH"])
    return {**kept, "PATH": path, "PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", **more}


class Serving:
    """`python3 openai_compat.py ...` on a free port, until the end of the with block."""

    def __init__(self, folder, command):
        self.process = subprocess.Popen(
            ["bash", "-c", "exec %s --port 0" % command], cwd=str(folder),
            env=surroundings(folder), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            universal_newlines=True)
        self.greeting = self.process.stderr.readline()
        self.port = re.search(r":(\d+)/v1", self.greeting)[1]
        self.base_url = "http://127.0.0.1:%s/v1" % self.port

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def serving(desk):
    with Serving(desk, "python3 openai_compat.py") as server:
        yield server


LESSON = block("console", "Serving")


@pytest.fixture(scope="module")
def lesson(desk):
    (command, greeting), = transcript(LESSON)
    with Serving(desk, command) as server:
        assert greeting == server.greeting.replace(":%s/" % server.port, ":8000/")
        yield server


def free_port():
    with Server() as server:
        return server.server_port


def run_commands(folder, commands, server, **more):
    """(what it prints, its status) of each command, in one bash; 8000 becomes the
    server's port."""
    script = "\n".join("%s\nstatus=$?; echo; echo '<ended>' $status; (exit $status)" % command
                       for command in commands)
    done = subprocess.run(
        ["bash"], input=script.replace("8000", server.port), cwd=str(folder),
        env={**surroundings(folder, OPENAI_BASE_URL=server.base_url), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, universal_newlines=True)
    printed = done.stdout.replace(":%s/" % server.port, ":8000/")
    parts = re.split(r"(?:(?<=\n)|(?<!\n)\n|\A)\n?<ended> (\d+)\n", printed)
    assert len(parts) == 2 * len(commands) + 1, printed
    printed = [text + "\n" * (text[-1:] not in ("", "\n")) for text in parts[::2]]
    return list(zip(printed, map(int, parts[1::2])))


CONSOLES = [(section, text) for section, language, text, _ in BLOCKS
            if language == "console" and text != LESSON]


@pytest.mark.parametrize("section, text", CONSOLES,
                         ids=lambda each: transcript(each)[0][0][:60] if "$" in each else "")
def test_a_transcript_of_the_readme_is_what_is_printed(request, desk, section, text):
    server = request.getfixturevalue("lesson" if section == "A lesson" else "serving")
    expected = transcript(text)
    printed = run_commands(desk, [command for command, _ in expected], server)
    for (command, shown), (got, _) in zip(expected, printed):
        assert re.fullmatch(pattern(shown), without_times(got)), (command, shown, got)


# ----------------------------------------------------------------------------------
# The recipes are run by pytest as they stand; those that import openai in `make interop`.

TESTS = [text for _, language, text, _ in BLOCKS if language == "python" and "def test_" in text]


def needs_openai(text):
    return "import openai" in text or "from asking" in text


def run_pytest(python, folder, *arguments, options=(), **more):
    """What pytest says about the tests of a folder; all of them must pass."""
    done = subprocess.run(
        [str(python), *options, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=str(folder), env=surroundings(folder, **more), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def put(folder, desk, **texts):
    """A folder with the desk's modules and these texts as further ones."""
    shutil.copytree(str(desk), str(folder))
    for name, text in texts.items():
        (folder / (name + ".py")).write_text(text, encoding="utf-8")
    return folder


def test_the_recipes_of_the_readme_pass(desk, tmp_path):
    texts = [text for text in TESTS if not needs_openai(text)]
    folder = put(tmp_path / "recipes", desk,
                 **{"test_%d" % i: text for i, text in enumerate(texts)})
    assert run_pytest(sys.executable, folder) == len(texts) - 1 + len(QUIRKS)


@pytest.mark.interop
def test_the_recipes_of_the_readme_with_the_official_sdk_pass(desk, tmp_path):
    texts = [text for text in TESTS if needs_openai(text)]
    folder = put(tmp_path / "recipes", desk,
                 **{"test_%d" % i: text for i, text in enumerate(texts)})
    assert run_pytest(SDK, folder, "-W", "error") == len(texts) >= 3


def test_a_recipe_of_the_readme_has_at_most_12_lines():
    recipes = [*TESTS, *CONFTESTS, FILES["wrapper.py"], FILES["responding.py"],
               FILES["embedding.py"], FILES["asking.py"]]
    for text in recipes:
        lines = [line for line in text.splitlines()
                 if line.strip() and not line.startswith(("import ", "from "))]
        assert len(lines) <= 12, text


ONE_SERVER_PER_TEST = '''
import pytest
from client import Client

@pytest.mark.parametrize("text", ["Hello!", "Bye!"])
def test_each_test_has_a_server_of_its_own(server, text):
    server.backend = text
    assert Client().chat_completions("Hi")["choices"][0]["message"]["content"] == text
    assert len(server.journal) == 2         # GET /v1/models, and the question
'''
AN_APPLICATION_THAT_STAYS = '''
import os, socket, time, pytest

def ask(end=time.monotonic() + 60):
    while time.monotonic() < end:
        try:
            connection = socket.create_connection(("127.0.0.1", int(os.environ["APP_PORT"])))
        except ConnectionRefusedError:
            continue                        # it is still starting
        with connection, connection.makefile("rwb") as file:
            file.write(b"GET /hi HTTP/1.0\\r\\n\\r\\n")
            file.flush()
            return file.read().decode()

@pytest.mark.parametrize("text", ["Hello!", "Bye!", "And again."])
def test_the_application_is_told_once(server, app, text):
    server.backend = text
    assert ask() == text
    assert len(server.journal) == 1
'''


def conftest(containing):
    found, = [text for text in CONFTESTS if containing in text]
    return found


def test_the_conftest_of_the_readme_gives_each_test_a_server(desk, tmp_path):
    folder = put(tmp_path / "conftest", desk, conftest=conftest("Server() as server"),
                 test_it=ONE_SERVER_PER_TEST)
    assert run_pytest(sys.executable, folder) == 2


def test_the_conftest_for_an_application_that_is_a_process(desk, tmp_path):
    text = conftest("8765").replace("8765", str(free_port()))
    folder = put(tmp_path / "process", desk, conftest=text, test_it=AN_APPLICATION_THAT_STAYS)
    assert run_pytest(sys.executable, folder, APP_PORT=str(free_port())) == 3


CASSETTE = '''
from client import Client

def test_it_answers(server):
    reply = Client().chat_completions("Hi", model="m")
    assert reply["choices"][0]["message"]["content"] == "Hello!"
'''


def test_the_cassette_of_the_readme_is_recorded_once_and_replayed(desk, tmp_path):
    with Server("Hello!", api_keys="sesame") as live:
        text = conftest("Relay(").replace("https://api.openai.com/v1", live.base_url)
        folder = put(tmp_path / "cassette", desk, conftest=text, test_it=CASSETTE)
        (folder / "tape.jsonl").unlink()
        for _ in range(2):
            assert run_pytest(sys.executable, folder, RECORD="1", OPENAI_API_KEY="sesame") == 1
        assert len(live.journal) == 1
    assert run_pytest(sys.executable, folder) == 1
    (folder / "test_it.py").write_text(CASSETTE.replace('"Hi"', '"Ho"'))
    with pytest.raises(AssertionError, match="Replay: POST /chat/completions"):
        run_pytest(sys.executable, folder)


def test_the_program_with_the_client_does_what_it_says(monkeypatch, desk, serving, capsys):
    text = block("python", "from client import Client, fold, pieces").replace("8000", serving.port)
    names = {"__name__": "readme"}
    exec(compile(text, "README.md", "exec"), names)
    assert capsys.readouterr().out == re.search(r"print\(.*# (.*)", text)[1]
    said = re.findall(r'^(\S.*?) +# (".*")$', text, re.MULTILINE)
    assert len(said) == 2
    for expression, value in said:
        assert eval(expression, names) == json.loads(value)


def readme_asked(server, **fields):
    body = json.dumps({"model": "any", **fields}).encode()
    path = "/chat/completions" if "messages" in fields else "/completions"
    with urllib.request.urlopen(server.base_url + path, body, timeout=60) as reply:
        return json.load(reply)


def test_the_tokenizer_of_the_readme_counts(desk):
    """With a stand-in for tiktoken; tiktoken itself was tried by hand."""
    with Serving(desk, "python3 openai_compat.py --tokenizer counting:tokens") as server:
        reply = readme_asked(server, messages=[{"role": "user", "content": "Hallo 世界"}])
        assert reply["choices"][0]["message"]["content"] == "Hallo 世界"
        assert reply["usage"]["prompt_tokens"] == len("Hallo 世界".encode())
        assert readme_asked(server, prompt="世界", max_tokens=3)["choices"][0]["text"] == "世"


def test_the_wrapper_of_the_readme_builds_a_template(desk):
    """With a stand-in for llama-cli that says its prompt."""
    command, = re.findall(r'--command "([^"]*wrapper.py)"', SECTIONS["In front of a model"])
    with Serving(desk, "python3 openai_compat.py --command '%s'" % command) as server:
        parts = [{"type": "text", "text": "-x"}, {"type": "text", "text": "y"}]
        reply = readme_asked(server, messages=[
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
        assert reply["choices"][0]["message"]["content"] == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n-xy<|im_end|>\n"
            "<|im_start|>assistant\n")
        assert "user\nOnce<" in readme_asked(server, prompt="Once")["choices"][0]["text"]


def test_a_script_is_followed_by_a_command_of_any_language(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "npm test").strip()], serving)
    *said, last = printed.strip().splitlines()
    assert (said[0], json.loads(said[1])["function"]["name"], last, status) == (
        "Hello!", "weather", "Take an umbrella.", 0), printed


# ----------------------------------------------------------------------------------
# The lesson.

def verdicts(desk, module):
    """{quirk: what torture.py says of a parser}."""
    done = subprocess.run([sys.executable, "torture.py", module], cwd=str(desk), timeout=120,
                          env=surroundings(desk), stdout=subprocess.PIPE, universal_newlines=True)
    return dict(line.split(None, 1) for line in done.stdout.splitlines())


def test_the_naive_parser_of_the_lesson_is_wrong_in_silence(desk):
    wrong = {quirk for quirk, verdict in verdicts(desk, "naive").items() if "WRONG" in verdict}
    assert wrong == {"no_space", "truncate"}


def test_the_solution_of_the_lesson_is_right_or_says_why(desk):
    said = verdicts(desk, "careful")
    assert set(said) == set(QUIRKS)
    errors = {quirk for quirk, verdict in said.items() if verdict != "right"}
    assert errors == {"no_finish", "bad_json", "error_event", "truncate", "stall", "reset",
                      "html_502"}
    assert not any("WRONG" in verdict for verdict in said.values())
    assert "%d are right, %d say" % (len(said) - len(errors), len(errors)) in README


def test_the_sections_that_the_lesson_sends_to_are_there():
    source = (HERE / "openai_compat.py").read_text(encoding="utf-8")
    for paragraph in re.findall(r"\*(Read .*?)\*", SECTIONS["A lesson"], re.DOTALL):
        for name in re.findall(r'"(.+?)"', paragraph):
            assert re.search(r"^# %s\." % name, source, re.MULTILINE), name


# ----------------------------------------------------------------------------------
# Deployment.

def test_the_service_file_starts_a_server_that_exists(desk):
    service = configparser.ConfigParser(interpolation=None, strict=True)
    service.optionxform = str
    service.read_string(FILES["openai_compat.service"])
    python, module, *flags = shlex.split(service["Service"]["ExecStart"])
    assert (python, module) == ("/usr/bin/python3", "openai_compat.py")
    with Serving(desk, "python3 openai_compat.py %s --host 127.0.0.1" % " ".join(
            map(shlex.quote, flags))) as server:
        assert "wrapper" not in server.greeting and "python3" in server.greeting


@pytest.mark.system
def test_the_certificate_of_the_readme_is_trusted_where_it_is_named(desk, serving):
    (printed, status), = run_commands(desk, [block("sh", "openssl").strip()], serving)
    assert printed.strip().splitlines()[-1] == "Hello!" and status == 0


@pytest.mark.system
def test_nginx_takes_the_configuration_of_the_readme(desk):
    server = "python3 openai_compat.py"
    with Serving(desk, server) as one, Serving(desk, server) as two:
        port = str(free_port())
        site = FILES["openai_compat.conf"]
        for was, now in (("8000", port), ("8001", one.port), ("8002", two.port)):
            site = site.replace(was, now)
        (desk / "nginx.conf").write_text(
            "daemon off; pid pid; error_log log; events {} http { access_log off;"
            "client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f;"
            "uwsgi_temp_path u; scgi_temp_path s; %s }" % site)
        nginx = subprocess.Popen(["nginx", "-p", str(desk), "-c", "nginx.conf"],
                                 stderr=subprocess.DEVNULL)
        try:
            behind = client.Client("http://127.0.0.1:%s/v1" % port, max_retries=5)
            texts = client.pieces(behind.chat_completions("Hello!", stream=True))
            assert "".join(texts) == "Hello!"
        finally:
            nginx.terminate()
            nginx.wait()


# ----------------------------------------------------------------------------------
# Nothing is left out, and nothing is there that the program has not.

def table(heading):
    """{name: the other cells} of the table with this first heading; a row may name
    several things."""
    (rows,) = re.findall(r"^\| %s \|.*\n\|[-|]+\n((?:\|.*\n)+)" % re.escape(heading), README,
                         re.MULTILINE)
    found = {}
    for row in rows.splitlines():
        first, *others = [cell.strip() for cell in row.strip("|").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first):
            found[name] = others
    return found


@pytest.mark.parametrize("function, heading", [
    (Server, "`Server`"), (Reply, "`Reply`")])
def test_a_table_has_each_argument_and_its_default(function, heading):
    rows = table(heading)
    for name, parameter in inspect.signature(function).parameters.items():
        assert name in rows, name
        default = rows[name][0]
        shown = re.findall(r"`([^`]*)`", default)
        if shown and len(shown) == 1:
            value = getattr(parameter.default, "__name__", repr(parameter.default))
            assert shown[0] == value.replace("'", '"')
    assert set(rows) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("function, heading", [
    (Relay, "Argument"), (Replay, "Argument"), (Script, "Argument of `Script`")])
def test_a_table_has_each_argument(function, heading):
    rows = " ".join(table(heading))
    for name in inspect.signature(function).parameters:
        assert re.search(r"\b%s\b" % name, rows), name


def test_the_arguments_of_the_client_are_those_that_are_shown():
    assert "`Client%s`" % inspect.signature(client.Client) in SECTIONS["Client"]


def test_the_table_of_the_journal_has_its_fields():
    with Server("x") as server:
        readme_asked(server, prompt="x")
        assert set(table("Field")) == {
            name for name in dir(server.journal[0]) if not name.startswith("_")
            and not callable(getattr(server.journal[0], name))} - {"content", "clock", "FIELDS"}


@pytest.mark.parametrize("name, heading", [("openai_compat.py", "Flag"), ("client.py", "Option")])
def test_each_flag_is_in_its_table_and_no_other(name, heading):
    said = subprocess.run([sys.executable, str(HERE / name), "--help"], stdout=subprocess.PIPE,
                          universal_newlines=True).stdout
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*(?=[ \],\n])", said)) - {"--help", "-h"}
    assert len(flags) > 15
    assert {row.split()[0] for row in table(heading)} - {
        "bench"} == flags


def test_the_table_of_quirks_says_which_bend_a_whole_reply():
    rows = table("Quirk")
    assert set(rows) == set(QUIRKS)
    for quirk, (_, whole) in rows.items():
        with Server("Hello!", quirk=quirk) as server:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(server.base_url + "/completions",
                                       b'{"model": "m", "prompt": "Hi"}', timeout=0.5).read()
        outcome = server.journal[0].outcome
        assert (outcome == "complete") == (whole == "no"), (quirk, outcome)


@pytest.mark.parametrize("path", Server.ROUTES)
def test_each_endpoint_is_in_the_readme(path):
    path = path if path in ("/", "/health", "/journal") else "/v1" + path
    path += "{id}" if path == "/v1/models/" else ""
    method = "POST" if path.endswith("completions") else "GET"
    assert "%s %s" % (method, path) in table("Endpoint")


CHAT, TEXT = {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi"}


@pytest.mark.parametrize("kind, row", re.findall(
    r"^\| (obeyed|checked|accepted).*? \| (.*) \|$", SECTIONS["Reference"], re.MULTILINE))
def test_a_parameter_is_checked_where_the_readme_says_so(kind, row):
    names = re.findall(r"`(\w+)`", row)
    with Server("x") as server:
        for name in names:
            statuses = []
            for path, body in (("/chat/completions", CHAT), ("/completions", TEXT)):
                wrong = json.dumps({"model": "m", **body, name: {"": []}})
                try:
                    urllib.request.urlopen(server.base_url + path, wrong.encode(), timeout=60)
                    statuses.append(200)
                except urllib.error.HTTPError as error:
                    statuses.append(error.code)
            assert (400 in statuses) == (kind != "accepted"), (name, statuses)


def test_each_parameter_is_in_the_readme():
    for name in {*openai_compat.CHAT_FIELDS, *openai_compat.COMPLETION_FIELDS, "prompt"}:
        assert "`%s`" % name in SECTIONS["Reference"], name


@pytest.mark.parametrize("name", openai_compat.__all__)
def test_each_name_of_the_module_is_in_the_readme(name):
    assert re.search(r"\b%s\b" % name, README)


def test_each_error_of_the_client_is_in_the_readme():
    for name in client.__all__:
        value = getattr(client, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert "`%s`" % name in SECTIONS["Client"], name


def test_each_argument_of_an_error_and_a_call_is_in_the_readme():
    for function in (openai_compat.APIError, ToolCall):
        for name in inspect.signature(function).parameters:
            assert re.search(r"%s\([^)]*\b%s\b" % (function.__name__, name), README), name


def test_the_contents_are_the_headings():
    contents = README.partition("**Contents:**")[2].partition("\n## ")[0]
    assert re.findall(r"\[([^]]+)\]\(#", contents) == list(SECTIONS)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors


def test_the_make_targets_of_the_readme_are_there():
    makefile = (HERE / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z-]+)`", README)
    assert {"test", "test-all", "interop", "system"} <= set(targets)
    for target in targets:
        assert re.search(r"^%s:" % target, makefile, re.MULTILINE), target


def test_each_block_of_the_readme_is_of_a_kind_that_is_run():
    known = [*FILES.values(), *TESTS, *CONFTESTS,
             block("python", "from client import Client, fold, pieces")]
    for _, language, text, _ in BLOCKS:
        assert language in ("console", "sh") or text in known, text
    assert len([text for _, language, text, _ in BLOCKS if language == "sh"]) == 2
    assert README.count("```") == 2 * len(BLOCKS)


def test_each_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((HERE / picture).exists() for picture in pictures)


def test_the_lines_of_the_readme_are_short():
    words = re.sub(r"^```console\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in words.splitlines() if len(line) > 110 and line[0] != "|"] == []


def test_the_readme_keeps_to_its_words():
    barred = r"\b(?:payloads?|packets?|frames?|docker)\b|\t|/(?:work|tmp|root|home)/"
    assert re.findall(barred, README, re.IGNORECASE) == []


# ----------------------------------------------------------------------------------
# Somebody's application, written as its users write it, on the newest official SDK; its
# tests have nothing but this fixture.

SDK = HERE / ".venvs" / "openai" / "bin" / "python"
APPLICATION = HERE / ".application"


@pytest.mark.interop
@pytest.mark.parametrize("python, arguments", [
    ([], ["-n", "4"]), (["-X", "dev", "-W", "error"], ["-W", "error"])], ids=["xdist", "dev"])
def test_an_application_is_tested_with_nothing_but_this_fixture(tmp_path, python, arguments):
    for name in ("travel.py", "test_travel.py", "conftest.py"):
        shutil.copy(str(APPLICATION / name), str(tmp_path))
    shutil.copy(openai_compat.__file__, str(tmp_path))
    assert run_pytest(SDK, tmp_path, *arguments, options=python) >= 40
