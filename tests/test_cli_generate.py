"""`clex generate` and `clex chat` with tiny models: text out, numbers, refusals, turns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import clex
import tiny
from clex.cli import app
from clex.conversation import Conversation, encode, encode_messages, fit
from clex.errors import ConfigError, DataError
from clex.hf.session import Session

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "the sea was calm and the old ship lay in the bay until the wind came up "


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template, window 64, a token for each byte."""
    return tiny.write_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template; it answers in ASCII."""
    folder = tiny.write_model(tmp_path_factory.mktemp("talker") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    # Bytes that are no text come back from decoding and encoding as others: letters only.
    odd = [i for token, i in tiny.make_tokenizer().get_vocab().items() if not token.isascii()]
    transformers.GenerationConfig(suppress_tokens=odd).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of `clex extend`, to 4 times the window."""
    model = clex.extend(clex.hf.models.load_base(plain), clex.ClexConfig(max_scale=4, steps=4))
    tiny.stir(model)
    folder = tmp_path_factory.mktemp("extended")
    clex.save(model, folder, weights="none", base_model=str(plain))
    return folder


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def refused(*arguments: object, text: str | None = None) -> str:
    """The one line that the program prints for a user's mistake."""
    result = run(*arguments, text=text)
    assert isinstance(result.exception, clex.ClexError), result.output
    assert not result.stdout
    return str(result.exception)


def greedy(model: Any, prompt: str, new: int, t: float) -> str:
    """The likeliest tokens, by full forward passes at a held scale."""
    ids = list(prompt.encode())
    tokens = encode(tiny.make_tokenizer(), prompt)
    assert len(tokens) == len(ids)
    with clex.at_scale(model, t):
        for _ in range(new):
            tokens.append(int(tiny.logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    text: str = tiny.make_tokenizer().decode(tokens[len(ids) :])
    return text


def test_generate_holds_the_scale_of_prompt_and_answer(extended: Path, tmp_path: Path) -> None:
    prompt = (TEXT * 3)[:150]
    (tmp_path / "prompt.txt").write_text(prompt)
    result = run("generate", extended, "--file", tmp_path / "prompt.txt", "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    model = clex.load(extended)
    t = clex.hf.extend.scale_for(model, 180)
    assert result.stdout == greedy(model, prompt, 30, t) + "\n"
    assert greedy(model, prompt, 30, t) != greedy(model, prompt, 30, 1.0)
    status = (
        r"\[window 256 \(native 64 x 4\), t 2\.83, 180 tokens used, 30 new at [0-9.]+ tokens/s\]"
    )
    assert re.fullmatch(status, result.stderr.strip())
    held = run("generate", extended, "--prompt", prompt, "--max-new-tokens", 30, "--scale", 4)
    assert held.stdout == greedy(model, prompt, 30, 4.0) + "\n"
    assert "t 4, 180 tokens used" in held.stderr
    piped = run("generate", extended, "--max-new-tokens", 30, "--chunk", 7, text=prompt)
    assert piped.stdout == result.stdout


def test_long_prompts_are_refused_or_cut(extended: Path, plain: Path) -> None:
    prompt = TEXT * 10
    command = ("generate", extended, "--prompt", prompt, "--max-new-tokens", 56)
    message = refused(*command)
    assert f"the prompt has {len(prompt)} tokens and 200 fit: window 256 (native 64 x 4)" in message
    kept = {
        "start": prompt[-200:],
        "end": prompt[:200],
        "middle": prompt[:100] + prompt[-100:],
    }
    model = clex.load(extended)
    for cut, rest in kept.items():
        result = run(*command, "--truncate", cut)
        assert result.stdout == greedy(model, rest, 56, 4.0) + "\n"
    assert "64 fit" not in refused("generate", plain, "--prompt", TEXT, "--max-new-tokens", 20)
    assert "no room for a prompt" in refused(*command[:-1], 256)


def test_what_contradicts_is_refused(extended: Path, plain: Path, tmp_path: Path) -> None:
    generate = ("generate", plain, "--prompt", "a")
    assert "contradict" in refused(*generate, "--file", "b")
    assert "prompt is empty" in refused("generate", plain, text="")
    assert "cannot read" in refused("generate", plain, "--file", tmp_path / "none.txt")
    assert "no chat template" in refused(*generate, "--chat")
    assert "need a --temperature" in refused(*generate, "--top-p", 0.9)
    assert "at least 0, not -1" in refused(*generate, "--temperature", -1)
    assert "scale 3 is out of range" in refused(*generate, "--scale", 3)
    assert "needs a --method" in refused(*generate, "--max-scale", 3)
    assert "is extended already" in refused(
        "generate", extended, "--prompt", "a", "--method", "yarn"
    )
    assert "no chat template" in refused("chat", plain, text="hello\n")
    assert "need a chat template" in refused("chat", plain, "--plain", "--system", "a")


def test_sampling_follows_the_seed(plain: Path) -> None:
    def sample(*options: object) -> str:
        result = run("generate", plain, "--prompt", "the", "--max-new-tokens", 40, *options)
        assert result.exit_code == 0, result.output
        return result.stdout

    warm = ("--temperature", 2, "--seed")
    assert sample(*warm, 1) == sample(*warm, 1) != sample(*warm, 2)
    assert sample(*warm, 1, "--top-k", 1) == sample()
    assert sample("--repetition-penalty", 5.0) != sample()


def test_chat_grows_saves_and_starts_anew(talker: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    (tmp_path / "long.txt").write_text(TEXT)
    lines = [
        "hello",
        f"/file {tmp_path / 'long.txt'}",
        f"/save {saved}",
        "/what",
        "/reset",
        "",
        "a",
    ]
    result = run(
        *("chat", talker, "--method", "yarn", "--max-scale", 8, "--system", "be short"),
        *("--max-new-tokens", 12, "--temperature", 0),
        text="\n".join(lines),
    )
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "be short" and messages[3]["content"] == TEXT
    lines = result.stderr.splitlines()
    assert lines[0] == "window 512 (native 64 x 8), t -, 0 tokens used"
    uses = [int(n) for n in re.findall(r"(\d+) tokens used, 12 new", result.stderr)]
    tokens = encode_messages(_tokenizer(talker), messages[:2])
    assert uses[0] == len(tokens) + 12
    assert uses[1] > uses[0] + len(TEXT) and uses[2] < uses[1]
    assert "t 1.19 to 2.83 at 174 tokens: refill" in result.stderr
    assert "'/what' is not one of" in result.stderr
    assert "a new conversation" in result.stderr
    # What was said is what a model that reads the template says.
    answer = messages[2]["content"]
    assert answer and result.stdout.startswith(answer + "\n")


def _tokenizer(folder: Path) -> Any:
    return clex.hf.models.load_tokenizer(folder)


def test_chat_goes_on_after_a_full_window(talker: Path) -> None:
    command = ("chat", talker, "--method", "yarn", "--max-scale", 4, "--max-new-tokens", 10)
    lines = f"{TEXT[:60]}\n" * 3
    full = run(*command, text=lines)
    assert full.exit_code == 0
    assert re.search(r"clex: with this turn the text has \d+ tokens: window 256", full.stderr)
    assert len(re.findall("10 new", full.stderr)) == 2
    assert len(re.findall("10 new", run(*command, "--forget", text=lines).stderr)) == 3
    # A turn that does not fit is forgotten, and a shorter one goes on.
    again = run(*command, text=lines + "a\n")
    assert len(re.findall("10 new", again.stderr)) == 3


def make_talk(folder: Path, **settings: Any) -> Conversation:
    model = clex.extend(clex.hf.models.load_base(folder), clex.ClexConfig(max_scale=8, steps=4))
    return Conversation(Session(model, on_growth="rerotate"), _tokenizer(folder), **settings)


def test_turns_reuse_the_cache(talker: Path) -> None:
    talk = make_talk(talker)
    talk.say("hello", 5)
    talk.answer(5, write=lambda text: None, do_sample=False)
    read: list[int] = []
    talk.say("again", 5, read.append)
    said = talk.messages[1]["content"]
    new = len(encode(talk.tokenizer, f"{said}</assistant><user>again</user><assistant>"))
    assert sum(read) == new - len(said)  # the answer is in the cache, but for its last token


def test_interrupted_answers_stay_and_interrupted_turns_go(talker: Path) -> None:
    talk = make_talk(talker)
    pieces: list[str] = []

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("hello", 5, stop)
    assert talk.messages == []
    talk.say("hello", 5)

    def stop_later(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            stop()

    with pytest.raises(KeyboardInterrupt):
        talk.answer(200, write=stop_later, do_sample=False)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    talk.say("and", 5)
    assert talk.answer(5, write=pieces.append, do_sample=False).finish == "length"


def test_ctrl_c_ends_an_answer(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Session.generate

    def interrupted(self: Session, *args: Any, **options: Any) -> Any:
        generate(self, *args, **{**options, "max_new_tokens": 3} if not args else options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", lambda self, n, **o: interrupted(self, 3, **o))
    result = run("generate", plain, "--prompt", "the", "--max-new-tokens", 40)
    assert result.exit_code == 0
    assert "3 new" in result.stderr and "stopped" in result.stderr


def test_cutting() -> None:
    ids = list(range(10))
    assert fit(ids, 10, None, "") == ids
    assert fit(ids, 5, "middle", "") == [0, 1, 7, 8, 9]
    assert fit(ids, 1, "middle", "") == [9]
    with pytest.raises(DataError, match="10 tokens and 9 fit: here"):
        fit(ids, 9, None, "here")
    with pytest.raises(ConfigError, match="unknown --truncate 'ends'; did you mean 'end'"):
        fit(ids, 9, "ends", "")
