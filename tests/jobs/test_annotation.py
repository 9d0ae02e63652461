"""The annotators that a run can name, on a finished run of the bundled model, whose exact annotator is the truth."""

import json
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import pytest

from steerable.chains.records import read_jsonl, write_jsonl
from steerable.evals.agreement import measure_agreement_of_files
from steerable.jobs import annotation, main_job
from steerable.jobs.run import Run
from steerable.jobs.settings import STAGES, Config
from steerable.models.pocket import language
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def judge(monkeypatch):
    """A server that speaks the chat-completions protocol and labels chains as the exact annotator does, but for those
    with a text in `fails`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = request["messages"][-1]["content"].rpartition("<chain>\n")[2].removesuffix("\n</chain>")
            with server.lock:
                server.asked.append(text)
            chain = {"task_id": "", "sample": 0, "thinking": text}
            spans = [] if any(part in text for part in server.fails) else language.annotate(chain)
            reply = "".join(f'["{s["label"]}"]{text[s["start"] : s["end"]]}["end-section"]' for s in spans)
            body = {
                "choices": [{"message": {"role": "assistant", "content": reply or "No."}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": len(text), "completion_tokens": len(reply)},
            }
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.fails, server.lock = [], [], Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    yield server
    server.shutdown()
    server.server_close()


def kappa(folder, finished):
    return measure_agreement_of_files(finished / "spans.jsonl", folder / "spans.jsonl", finished / "chains.jsonl").kappa


def run(folder, stage, **settings):
    main_job.run(folder, stage=stage, fresh=False, workers=1, **settings)


@pytest.mark.slow
def test_a_language_model_labels_what_is_extracted_and_what_is_steered(copy, finished, judge):
    llm = {"annotator": "llm", "llm_model": "judge", "llm_url": judge.url, "llm_prices": "2,8"}
    run(copy, "annotate", **llm)
    assert kappa(copy, finished) > 0.99
    account = json.loads((copy / "coverage.json").read_text())["annotator"]
    usage = account["usage"]
    assert account["failed"] == 0 and usage["prompt_tokens"] > 0
    assert usage["cost"] == pytest.approx((2 * usage["prompt_tokens"] + 8 * usage["completion_tokens"]) / 1e6)

    asked = len(judge.asked)
    (copy / "spans.jsonl").unlink()  # the replies are still there
    run(copy, "annotate", **llm)
    assert len(judge.asked) == asked and kappa(copy, finished) > 0.99

    for stage in ("extract", "attribute", "select", "steer", "evaluate", "report"):
        run(copy, stage)
    report = json.loads((copy / "report.json").read_text())
    assert report["config"]["annotator"] == "llm" and report["coverage"]["annotator"] == account
    truth = {cell["name"]: cell for cell in json.loads((finished / "report.json").read_text())["cells"]}
    same = next(cell for cell in report["cells"] if cell["name"] == "unsteered")
    for label, interval in truth["unsteered"]["fractions"].items():
        assert same["fractions"][label] == pytest.approx(interval, abs=0.02)
    for file in copy.rglob("*"):
        assert not file.is_file() or b"very-secret" not in file.read_bytes(), file


def test_a_chain_that_the_judge_fails_on_is_dropped_and_counted(copy, judge):
    chains = read_jsonl(copy / "chains.jsonl", "chain")
    judge.fails = [chains[0]["thinking"].strip()[:60]]
    failing = sum(judge.fails[0] in chain["thinking"] for chain in chains)
    run(copy, "annotate", annotator="llm", llm_url=judge.url)
    coverage = json.loads((copy / "coverage.json").read_text())
    assert coverage["dropped"] == coverage["annotator"]["failed"] == failing >= 1
    left = {(span["task_id"], span["sample"]) for span in read_jsonl(copy / "spans.jsonl", "span")}
    assert (chains[0]["task_id"], chains[0]["sample"]) not in left and len(left) == len(chains) - failing


def test_a_missing_library_is_told_before_anything_is_written(finished, steerable, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    told = steerable("run", "--annotator", "llm", "--out", tmp_path / "run")
    assert told.code == 2 and told.err.count("\n") == 1 and "pip install 'steerable[llm]'" in told.err
    told = steerable("probe", "--to", tmp_path / "probe.safetensors", "--out", finished)
    assert told.code == 2 and told.err.count("\n") == 1 and "pip install 'steerable[probe]'" in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there(copy, steerable):
    before = (copy / "spans.jsonl").read_bytes()
    said = steerable("annotate", "--out", copy, "--annotator", "llm", "--llm-url", "http://127.0.0.1:9/v1")
    assert said.code in (1, 2) and said.err.count("\n") == 1 and "127.0.0.1:9" in said.err
    assert (copy / "spans.jsonl").read_bytes() == before


def test_keywords(copy, finished):
    run(copy, "annotate", annotator="keywords")
    assert kappa(copy, finished) > 0.8


@pytest.mark.slow
def test_a_probe_learns_from_a_run_and_labels_it(copy, finished, steerable, tmp_path):
    file = tmp_path / "probe.safetensors"
    said = steerable("probe", "--out", copy, "--to", file, "--folds", 3, "--layer", 3, "--json")
    trained = json.loads(said.out)
    assert trained["scores"]["kappa"] > 0.7 and trained["layers"] == [3]
    run(copy, "annotate", annotator=f"probe:{file}")
    assert kappa(copy, finished) > 0.8
    span = read_jsonl(copy / "spans.jsonl", "span")[0]
    assert sum(span["probabilities"].values()) == pytest.approx(1)
    run(copy, "evaluate")
    stamp = json.loads((copy / "stages/evaluate.json").read_text())
    annotation.train_probe(file, out=finished, layer=2, folds=3)
    run(copy, "evaluate")  # by the file's content, not its name
    assert json.loads((copy / "stages/evaluate.json").read_text())["key"] != stamp["key"]


def test_a_probe_needs_a_run_and_a_file(steerable, tmp_path):
    said = steerable("probe", "--out", tmp_path / "none", "--to", tmp_path / "p.safetensors")
    assert said.code == 2 and "is no run folder" in said.err and not (tmp_path / "p.safetensors").exists()
    said = steerable("run", "--annotator", "probe:nowhere.safetensors", "--out", tmp_path / "run")
    assert said.code == 2 and "there is no such file" in said.err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_stable_spans_are_kept(copy):
    few = read_jsonl(copy / "chains.jsonl")[:4]  # a continuation of every span is sampled several times
    write_jsonl(copy / "chains.jsonl", few)
    run(copy, "annotate")
    every = read_jsonl(copy / "spans.jsonl", "span")
    run(copy, "annotate", stability=0.6)
    kept = read_jsonl(copy / "spans.jsonl", "span")
    assert 0 < len(kept) < len(every) and all(span["stability"] >= 0.6 for span in kept)
    places = {(s["task_id"], s["sample"], s["start"], s["end"], s["label"]) for s in every}
    assert all((s["task_id"], s["sample"], s["start"], s["end"], s["label"]) in places for s in kept)
    assert json.loads((copy / "coverage.json").read_text())["unstable"] == len(every) - len(kept)


def test_stability_needs_an_annotator_that_is_a_function(copy, judge):
    with pytest.raises(UsageError, match="too slow"):
        run(copy, "annotate", annotator="llm", llm_url=judge.url, stability=0.5)


def test_agreement_on_the_command_line(copy, steerable):
    spans = copy / "spans.jsonl"
    said = steerable("annotate", "--agreement", spans, spans, "--chains", copy / "chains.jsonl", "--json")
    assert json.loads(said.out)["kappa"] == 1
    assert "kappa" in steerable("annotate", "--agreement", spans, spans).out
    assert steerable("annotate", "--chains", copy / "chains.jsonl").code == 2
    assert "there is no file" in steerable("annotate", "--agreement", spans, copy / "none.jsonl").err


def test_unknown_annotators_are_refused(copy):
    with pytest.raises((UsageError, SteerableError), match="cannot be imported"):
        run(copy, "annotate", annotator="everyone")


@pytest.mark.parametrize("options", [("--annotator", "llm"), ("--tasks", "llm:gpt-4.1")])
def test_a_missing_key_is_told_before_anything_is_done(options, steerable, tmp_path, monkeypatch):
    for name in ("STEERABLE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    said = steerable("run", "--model", "nowhere", "--out", tmp_path / "run", *options)
    assert said.code == 2 and "no key for OpenAI" in said.err and not (tmp_path / "run").exists()


def test_another_model_or_file_is_another_annotation(finished, tmp_path):
    """What an annotator's name alone does not say is part of the keys of the stages that annotate."""
    labels, tasks = tmp_path / "labels.yaml", tmp_path / "tasks.csv"
    labels.write_text("doubt: it doubts")

    def key(stage, **settings):
        run = Run(RunFolder(finished), Config(**{"annotator": f"llm:{labels}"} | settings))
        return main_job._depends_on(run, next(s for s in STAGES if s.name == stage))

    assert key("annotate", llm_model="a") != key("annotate", llm_model="b")
    assert key("annotate", annotator="keywords", llm_model="a") == key("annotate", annotator="keywords", llm_model="b")
    tasks.write_text("Body,answer\n1 + 1?,2\n")
    before = key("tasks", tasks=f"{tasks}?prompt=Body")
    tasks.write_text("Body,answer\n1 + 2?,3\n")
    assert key("tasks", tasks=f"{tasks}?prompt=Body") != before
    for stage in ("attribute", "select"):  # their inputs are the same, whatever is steered
        assert key(stage, behaviours="backtracking") != key(stage) != key(stage, behaviours="deduction")


@pytest.mark.parametrize(
    "made",
    [
        "def own(*_): return 1",
        "class A:\n    def __call__(self, *_): return 1\nown = A()",
        "from functools import partial\ndef f(n, *_): return n\nown = partial(f, 1)",
    ],
)
def test_what_a_function_of_ones_own_says_is_part_of_the_keys(made, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def keys(text):
        (tmp_path / "own_function.py").write_text(f"{made}\n{text}\n")
        sys.modules.pop("own_function", None)
        run = Run(RunFolder(tmp_path), Config(annotator="own_function:own", estimator="own_function:own"))
        return [main_job._depends_on(run, stage) for stage in STAGES if stage.name in ("annotate", "extract")]

    assert keys("") == keys("") and all(a != b for a, b in zip(keys(""), keys("# edited"), strict=True))


def test_the_settings_name_who_writes_tasks(tmp_path):
    """As `calibrate` and `audit` take them: the model of --llm-model, and replies that are asked for once."""
    made = annotation.writer(Config(tasks="llm", llm_model="judge", llm_url="http://localhost:1/v1"), tmp_path)
    assert made["endpoint"].model == "judge" and made["cache"] == tmp_path / "replies"
    assert annotation.writer(Config(tasks="llm:other"), tmp_path)["endpoint"] is None
    assert annotation.writer(Config(tasks="pocket"), tmp_path, dry_run=True) == {}
    with pytest.raises(UsageError, match="--dry-run would have --tasks llm write tasks, which costs"):
        annotation.writer(Config(tasks="llm:other"), tmp_path, dry_run=True)
