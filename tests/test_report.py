"""The page about a run: what is on it, that it is safe and whole, and that it works in a browser."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import tokenizer_of
from conftest import BIN, CHAT_TEMPLATE, ROOT, record, run, write_json

from mcp_lora.data.conversion import Settings, convert
from mcp_lora.errors import McpLoraError
from mcp_lora.evaluate import answers, questions
from mcp_lora.evaluate.answers import Judge, Notebook, Response
from mcp_lora.evaluate.evaluation import Evaluation, summarise
from mcp_lora.prompts.chat_template import ChatTemplate
from mcp_lora.report import page as report
from mcp_lora.train import manifest, runs
from mcp_lora.train.runs import adapter_hash

SCRIPT = "</script></pre><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
STARTED = "2026-11-24T12:00:00+00:00"
MODELS = ("base", "endpoint-hosted", "adapter")


def make_run(place: Path, name: str, wrong: int, **changes: Any) -> Path:
    """A run as training and eval leave it, of which every `wrong`th answer is not right."""
    data = place / "data"
    if not data.exists():
        rows = [
            record(f"Add {a} and {b} {SCRIPT}", f"sum-{b}", tool_response={})
            | {"server_info": {"server_name": f"server {b % 4} {SCRIPT}", "server_description": SCRIPT}}
            | {"function_call": {"name": f"sum-{b}", "arguments": {"a": a}}}
            for a in range(9)
            for b in range(12)
        ]
        for row in rows:
            row["tool_info"]["tool_description"] = f"Adds {SCRIPT}"
        source = write_json(place / f"rows {SCRIPT[-9:-2]}.json", rows)
        convert(Settings([str(source)], candidates=3, test=0.3, holdout_servers=0.4, no_call=0.3), data)
    folder = place / name
    config = {"model_name_or_path": "base/model", "dataset_dir": str(data), "dataset": "mcp_train"}
    config |= {"learning_rate": 2e-4, "lora_rank": 64} | changes
    runs.write_config(folder, config)
    lengths = {"median": 300, "p95": 400, "max": 420, "cutoff_len": 512}
    lengths |= {"histogram": [[200, 310, 12], [310, 420, 5]]}
    made = {"samples": 17, "shortened": 0, "dropped_tools": 0, "left_out": {}, "lengths": lengths}
    described = manifest.describe(config, ["llamafactory-cli"], {}, 2)
    manifest.write(folder, replace(described, started=STARTED, exit=0, rendered=made))
    # As transformers 5.5.4 writes it.
    history: list[dict[str, Any]] = [
        {"epoch": step / 40, "grad_norm": 1.2, "learning_rate": 2e-4 / step, "loss": 1 / step, "step": step}
        for step in range(10, 50, 10)
    ]
    history += [{"epoch": 1.0, "eval_loss": 0.4, "step": 40}, {"epoch": 1.0, "train_loss": 0.5, "step": 40}]
    write_json(folder / "trainer_state.json", {"global_step": 40, "log_history": history})
    write_json(folder / "adapter_config.json", {})
    asked = questions.read(data, [])
    judge = Judge(ChatTemplate(tokenizer_of(CHAT_TEMPLATE)))
    for model in MODELS:
        book = Notebook(folder / f"eval/{model}.jsonl", asked, model, 99, judge)
        for number, question in enumerate(asked):
            calls = [call._asdict() for call in question.expected]
            if number % wrong == 0:
                calls = [{"name": "sum-1", "arguments": {"a": SCRIPT}}]
            text = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
            if not text or (model == "base" and number % 7):
                text = f"No. {SCRIPT}"
            book.add(question, Response(f"prompt {SCRIPT}", text, []))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    return [make_run(place, "one", 5), make_run(place, "two & <i>", 3, learning_rate=1e-4)]


@pytest.fixture(scope="module")
def page(folders: list[Path]) -> str:
    return report.write(folders[:1]).read_text(encoding="utf-8")


def tags(page: str, name: str) -> list[str]:
    """The texts of elements that hold no others of their kind."""
    found = re.findall(rf"<{name}\b[^>]*>(.*?)</{name}>", page, re.S)
    return [" ".join(re.sub(r"<[^>]+>", " ", text).split()) for text in found]


def gains(page: str) -> str:
    return page.split('id="gains"')[1].split("</table>")[0]


def test_metrics_and_gains_are_shown_with_their_intervals(folders: list[Path], page: str) -> None:
    evaluation = summarise({model: answers.read(folders[0] / f"eval/{model}.jsonl") for model in MODELS})
    assert list(evaluation.splits) == ["seen", "unseen_server", "no_call"]
    rows = iter(tags(gains(page), "tr")[1:])
    for name, split in evaluation.splits.items():
        for place, (metric, gain) in enumerate(split.gains["adapter"].items()):
            row, reach = next(rows), f"({100 * gain.low:+.0f}…{100 * gain.high:+.0f})"
            assert row.endswith(f"{100 * gain.difference:+.1f} {reach} {gain.p:.1g}")
            assert row.startswith(f"{name} {split.count} {metric} " if place == 0 else f"{metric} ")
            for found in (split.metrics[model][metric] for model in MODELS):
                assert f'<i style="width: {100 * found.rate:.1f}%' in page
                whisker = f"left: {100 * found.low:.1f}%; width: {100 * (found.high - found.low):.1f}%"
                assert f'<b style="{whisker}"' in page
    assert not list(rows) and page.count('<div class="card tile">') == 3


def test_the_page_holds_what_the_run_was_made_of(folders: list[Path], page: str) -> None:
    assert {
        "base model base/model",
        "trained 40 steps, 1 epochs",
        "batch 16 = 8 per device × 1 accumulated × 2 processes",
    } <= set(tags(page, "tr"))
    conversion = json.loads((folders[0] / "manifest.json").read_text())["conversion"]
    for text in (
        "Tools, those that are worst for adapter first",
        'aria-label="right answers and first errors, by split and model"',
        'aria-label="loss over the steps"',
        'aria-label="learning rate over the steps"',
        'title="310 to 420 tokens: 5 samples"',
        f"{conversion['read']} rows read",
        "extra samples without the gold tool",
        "mcp-lora export",
        "PeftModel.from_pretrained",
    ):
        assert text in page, text


def test_examples_are_of_every_split_and_outcome(page: str) -> None:
    kinds = re.findall(r'data-split="(\w+)" data-outcome="(\w+)"', page)
    assert max(Counter(kinds).values()) == report.EXAMPLES
    assert {split for split, _ in kinds} == {"seen", "unseen_server", "no_call"}
    assert list(dict.fromkeys(outcome for _, outcome in kinds)) == ["lost", "wrong", "gained", "right"]


def test_differences_are_marked_by_lines() -> None:
    parts = report.compare('get {\n  "a": 12,\n  "b": "x y"\n}', 'get {\n  "a": 13,\n  "b": "x y"\n}')
    assert parts == [
        *(("same", "get {\n"), ("missing", '  "a": 12,\n'), ("extra", '  "a": 13,\n')),
        *(("same", '  "b": "x y"\n'), ("same", "}\n")),
    ]
    assert report.compare("get {}", "get {}") == [("same", "get {}")]


def test_the_page_needs_nothing_else(page: str) -> None:
    assert "<script>window.pwned" not in page and "<img" not in page
    assert "http://" not in page and "https://" not in page
    defined = set(re.findall(r"--([\w-]+):", page))
    assert set(re.findall(r"var\(--([\w-]+)\)", page)) <= defined


def test_runs_are_compared_on_the_questions_that_both_were_asked(folders: list[Path]) -> None:
    lines = (folders[1] / "eval/adapter.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folders[1] / "eval/adapter.jsonl").write_text("".join(lines[:-2]), encoding="utf-8")
    page = report.write(folders).read_text(encoding="utf-8")
    assert "2 questions that not all of them have answered are left out" in page
    assert "two &amp; &lt;i&gt;" in page and "<i>\n" not in page
    differing = tags("".join(re.findall(r'<tr class="differ">.*?</tr>', page, re.S)), "th")
    assert differing == ["learning_rate"] and "<details open><summary>run.yaml" in page
    assert len(tags(gains(page), "th")) == 2 + 2 + 2


def test_a_model_that_has_answered_less_than_the_adapter_is_left_out(
    folders: list[Path], page: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    file = folder / "eval/endpoint-hosted.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text(lines[0], encoding="utf-8")
    found = report.write([folder]).read_text(encoding="utf-8")
    assert f"endpoint-hosted has answered only 1 of {len(lines)} questions and is left out" in found
    assert "endpoint-hosted" not in gains(found)
    counts = re.compile(r"<p>\d+ questions</p>")
    assert counts.findall(found) == counts.findall(page)


def test_a_manifest_of_an_earlier_version_may_lack_the_times(folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    content |= {"ended": "2026-11-24T14:10:03+00:00"}
    for removed, time in (("", f"{STARTED}, took 2:10:03"), ("started", "not recorded")):
        write_json(folder / "manifest.json", {key: content[key] for key in content if key != removed})
        assert f"time {time}" in tags(report.write([folder]).read_text(encoding="utf-8"), "tr")


def test_what_is_missing_is_said(folders: list[Path], tmp_path: Path) -> None:
    def page_of(*places: Path) -> str:
        return report.write(places).read_text(encoding="utf-8")

    bare = tmp_path / "bare"
    runs.write_config(bare, {"model_name_or_path": "m"})
    (bare / "checkpoint-5").mkdir()
    (bare / "checkpoint-5/trainer_state.json").write_text('{"log_his')  # where it was killed
    page = page_of(bare)
    for text in (
        "no answers of its adapter",
        "Nothing was logged yet",
        "manifest.json contains no statistics",
    ):
        assert text in page, text
    page = page_of(bare, folders[0])
    assert f"of its adapter: <code>mcp-lora eval {bare}</code>" in page and gains(page)
    line = (folders[0] / "eval/adapter.jsonl").read_text(encoding="utf-8").splitlines()[0]
    write_json(bare / "eval/adapter.jsonl", json.loads(line) | {"question": "of other data"})
    assert "no evaluated question in common" in page_of(bare, folders[0])
    page = page_of(bare)  # one model, one question
    assert "1 questions" in page and "− adapter" not in page and "no answers of its adapter" not in page
    lines = (folders[0] / "eval/adapter.jsonl").read_text(encoding="utf-8").splitlines()
    answer = next(row for row in map(json.loads, lines) if not row["expected"])
    write_json(bare / "eval/adapter.jsonl", answer)
    assert "worst for adapter first" in page_of(bare)  # none, as no question has a gold tool
    (bare / "manifest.json").write_text("{")
    with pytest.raises(McpLoraError, match="manifest.json is damaged: .*mcp-lora report"):
        page_of(bare)


def test_questions_that_could_not_be_asked_are_counted(folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    found = Evaluation({}, [], [], adapter=adapter_hash(folder), left_out={"too-long": 9})
    (folder / "eval/metrics_part.json").write_text(found.metrics())
    page = report.write([folder]).read_text(encoding="utf-8")
    assert f"9 questions could not be asked in {folder} (too-long)." in page


def test_answers_of_an_older_checkpoint_are_marked(folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    found = Evaluation({}, [], [], adapter=adapter_hash(folder))
    of_another, of_base = (replace(found, adapter=adapter).metrics() for adapter in ("of another", None))
    earlier = '{"splits": {"seen": {"count": 1, "figures": {}}}}'  # of an earlier version
    (folder / "eval/metrics.json").write_text(found.metrics())
    newest = ((found.metrics(), False), (of_another, True), (of_base, False), (earlier, True))
    for metrics, stale in newest:
        (folder / "eval/metrics_part.json").write_text(metrics)
        page = report.write([folder]).read_text(encoding="utf-8")
        assert ("has changed since it was evaluated: mcp-lora eval" in page) == stale
    shutil.copytree(folder / "eval", folder / "eval/bfcl")  # as if it had been asked the leaderboard's, too
    page = report.write([folder]).read_text(encoding="utf-8")
    assert "changed since it was evaluated: mcp-lora eval" in page and 'id="judged"' in page
    assert re.search("changed since it was evaluated: mcp-lora eval [^<]* --benchmark bfcl</p>", page)
    with (folder / "eval/adapter.jsonl").open("a") as file:
        row = json.loads((folder / "eval/base.jsonl").read_text(encoding="utf-8").splitlines()[0])
        file.write(json.dumps(row | {"verdict": {"good": 1}}) + "\n")  # of another version
    assert report.write([folder])


def test_the_command(folders: list[Path], tmp_path: Path) -> None:
    done = run([BIN / "mcp-lora", "report", folders[0]], tmp_path)
    assert done.returncode == 0 and f"the report is {folders[0] / 'report.html'}" in done.stderr
    done = run([BIN / "mcp-lora", "report"], tmp_path)
    assert done.returncode == 2 and "outputs/mcp_lora contains no run" in done.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    # root may not use the sandbox; the rest keeps Chromium from asking the network for anything
    for word in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync user-data-dir={profile}"
    ).split():
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


def show(browser: Any, page: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
    size = {"width": width, "height": 2400, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def test_it_works_in_a_browser(browser: Any, folders: list[Path], page: str) -> None:
    file = folders[0] / "report.html"
    show(browser, file, 1200)
    assert browser.get_log("browser") == []
    made = "return [window.pwned, document.scripts.length, document.images.length]"
    assert browser.execute_script(made) == [None, 1, 0]

    def shown(**fields: str) -> list[list[str]]:
        """The split and outcome of each card that is shown, once the filter has been set."""
        for name, value in fields.items():
            browser.execute_script(
                "const field = document.querySelector('.filter').elements[arguments[0]];"
                "field.value = arguments[1]; field.dispatchEvent(new Event('input', {bubbles: true}))",
                name,
                value,
            )
        cards: list[list[str]] = browser.execute_script(
            "return [...document.querySelectorAll('.example')].filter((card) => card.offsetHeight)"
            ".map((card) => [card.dataset.split, card.dataset.outcome])"
        )
        count = browser.execute_script("return document.querySelector('.filter output').value")
        assert count == f"{len(cards)} of {page.count('data-outcome')}"
        return cards

    everything = shown()
    assert shown(outcome="lost") == [card for card in everything if card[1] == "lost"]
    assert shown(split="seen") == [card for card in everything if card == ["seen", "lost"]]
    assert shown(outcome="", split="") == everything
    assert shown(text="no such word") == []
    assert 0 < len(shown(text="SUM-1")) < len(everything)
    assert browser.get_log("browser") == []

    pictures = ROOT / "outputs/artefacts"
    pictures.mkdir(parents=True, exist_ok=True)
    colours = set()
    for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light")):
        show(browser, file, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert browser.save_screenshot(str(pictures / f"report-{width}-{scheme}.png"))
    assert len(colours) == 2
    show(browser, file, 800, "dark", media="print")
    assert browser.execute_script("return document.querySelector('nav').offsetHeight") == 0
    white = "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == white
