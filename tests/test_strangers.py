"""What strangers hand over as a model, a template, a tokenizer or a row: one line, or contained. Attacks are bounded in
time and memory; what each is about stands in common/README.md."""

import json
import re
import resource
import shutil
import signal
import threading
from array import array
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, lone_run, ranks, script, tiny_rows, try_train
from huggingface_hub.errors import DryRunError
from test_bad_input import attempt, model, refused, write_rows
from test_templates import CHATML
from test_tokenization import make, says
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import templates
from common import tokenization as tok
from common.batches import fit, split_group
from common.data import Row
from common.runtime import encoding
from common.runtime import model as model_files
from common.runtime.encoding import encode_rows
from common.runtime.flags import InputError
from common.runtime.parallel import exchange



def rewritten(folder, **parts):
    """A copy of the tiny model whose tokenizer.json has other parts."""
    path = model(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return path.parent


def without_panic_lines(err):
    """What we print: the library, written in Rust, prints lines of its own before."""
    lines = err.splitlines()
    return "\n".join(lines[max((k for k, line in enumerate(lines) if line.startswith("error:")), default=0) :])


# ---- the tokenizers library panics (S12) ---------------------------------------------------------

BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(9+)+x"}, "behavior": "Isolated", "invert": False}
NINES = "9" * 40  # 2 ** 40 ways to read it: beyond 10 million steps the regular expressions of the library panic
ROW, BAD_ROW = {"prompt": "3+4=", "completion": "7"}, {"prompt": "3+4=", "completion": NINES}


@pytest.mark.parametrize("many", (False, True), ids=("one process", "processes"))
def test_a_panic_is_one_line_with_its_row(many, tmp_path):
    def patch(_):
        if many:
            encoding.MANY_ROWS, encoding.CHUNK_ROWS = 1, 1

    flags = ["--model", rewritten(tmp_path, pre_tokenizer=BACKTRACKS), "--max_length", 100]
    data = write_rows(tmp_path, ROW, ROW, BAD_ROW, ROW)
    result = attempt("sft", tmp_path, *flags, "--dataset", data, patch=patch)
    result.err = without_panic_lines(result.err)
    refused(result, tmp_path, "mine.jsonl:3", "retry-limit-in-match", "Mend the row")


def test_a_panic_ends_all_ranks(tmp_path):
    flags = ["--model", rewritten(tmp_path, pre_tokenizer=BACKTRACKS), "--max_length", 100]
    data = write_rows(tmp_path, *[ROW] * 300, BAD_ROW, *[ROW] * 300)
    for result in try_train("sft", tmp_path / "run", *flags, "--dataset", data, world=2):
        assert result.error.startswith("InputError: ") and "mine.jsonl:301" in result.error


def test_a_panic_at_the_first_letter(tmp_path):
    """Where a tokenizer is tried, as it is loaded: 3 ** 18 ways to see that nothing fits."""
    always = {**BACKTRACKS, "pattern": {"Regex": "(?:(?=a)|(?!b)|(?!c))" * 18 + "(?=a)(?!a)"}}
    folder = rewritten(tmp_path, pre_tokenizer=always)
    result = attempt("sft", tmp_path, "--model", folder, "--max_length", 100)
    result.err = without_panic_lines(result.err)
    refused(result, tmp_path, str(folder), "retry-limit-in-match", "--model")


def test_a_panic_in_the_thread_of_a_reward_model(tmp_path):
    """An Exception, as the judge's handlers take it."""
    replaces = {"type": "Replace", "pattern": {"Regex": "(9+)+x"}, "content": ""}
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}, replaces]}
    tokenizer = tok.load_tokenizer(rewritten(tmp_path, pre_tokenizer=BACKTRACKS, decoder=decoder))
    caught = []

    def judge():
        for act in (lambda: tok.encode_demonstration(Row(BAD_ROW), tokenizer, [2]),
                    lambda: tokenizer.decode(tokenizer.convert_tokens_to_ids(list(NINES)))):
            try:
                act()
            except Exception as error:
                caught.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert [type(error) for error in caught] == [tok.Panic, tok.Panic]
    assert tokenizer.decode(tokenizer.encode("3+4")) == "3+4"


def test_other_ends_are_not_panics():
    for kind in KeyboardInterrupt, SystemExit, MemoryError, ValueError:
        with pytest.raises(kind) as caught, tok.no_panic():
            raise kind()
        assert type(caught.value) is kind


# ---- texts that cannot fit (W6) ------------------------------------------------------------------

MOST = 20  # tokens of a row


def word_tokenizer(*normalizer, pre_tokenizer=None, token=None):
    """A byte-pair tokenizer over a few letters with tokens of up to eight of them, and of eight blanks."""
    pieces = [*"abxé▁ ", "aa", "aaaa", "aaaaaaaa", "  ", "    ", "        "]
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa"), (" ", " "), ("  ", "  "), ("    ", "    ")]
    core = Tokenizer(models.BPE({"</s>": 0, "<unk>": 1} | {p: k for k, p in enumerate(pieces, 2)}, merges,
                                unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.normalizer = normalizers.Sequence(list(normalizer))
    if pre_tokenizer:
        core.pre_tokenizer = pre_tokenizer
    core.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    if token:
        core.add_tokens([token])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


KINDS = {
    "as it is": word_tokenizer(),
    "NFKC": word_tokenizer(normalizers.NFKC()),
    "white space shrinks": word_tokenizer(normalizers.Replace(Regex(" +"), " ")),
    "white space goes": word_tokenizer(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "white space at the ends goes": word_tokenizer(normalizers.Strip()),
    "a token takes the white space before it": word_tokenizer(token=AddedToken("xx", lstrip=True)),
    "a token takes the white space behind it": word_tokenizer(token=AddedToken("xx", rstrip=True)),
    "accents go": word_tokenizer(normalizers.NFD(), normalizers.StripAccents()),
    "unknown ones are one": word_tokenizer(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
}
TEXTS = {
    "few": "aaaa", "as many as fit": "a" * 8 * (MOST - 1), "one more": "a" * 8 * MOST,
    "twice": "a" * (16 * MOST + 1), "very many": "a" * 40_000, "blanks inside": "a" + " " * 40_000 + "b",
    "blanks first": " " * 40_000 + "a", "blanks last": "a" + " " * 40_000, "blanks before a token": " " * 40_000 + "xx",
    "blanks behind a token": "xx" + " " * 40_000, "accents": "e" + "\u0301" * 40_000 + "a",
    "words apart": ("b" + " " * 40) * 9, "words far apart": ("b" + " " * 4000) * 5,
    "decomposed": "e\u0301" * 9, "one that grows": "\ufdfa" * 9, "unknown": "q" * 40_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_dropped_that_could_fit(kind):
    """The oracle encodes all of every text. With the limit the same rows are kept, with the same tokens."""
    tokenizer, stops = KINDS[kind], [0]
    for name, text in TEXTS.items():
        row = Row(text=text)
        tokenizer.most_tokens = 10**9
        (whole,) = tok.encode_demonstration(row, tokenizer, stops)
        tokenizer.most_tokens = MOST
        (group,) = tok.encode_demonstration(row, tokenizer, stops)
        length = len(whole["completions"][0]["ids"])
        assert group == whole if length <= MOST else len(group["completions"][0]["ids"]) > MOST, (name, length)


def args_of(**more):
    flags = ["--max_length", str(MOST), *[str(word) for pair in more.items() for word in (f"--{pair[0]}", pair[1])]]
    return script("sft").parse_args(flags)


def longest_read(monkeypatch, rows, encode, args):
    """Encode the rows -> their groups, and the characters of the longest text that the library was given."""
    tokenizer = make(CHATML)
    seen = []
    encode_text = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: seen.append(len(text)) or encode_text(text, **more))
    rows = [Row(row) for row in rows]
    for number, row in enumerate(rows):
        row.index = number
    return encode_rows(lone_run(args), rows, encode, tokenizer, tok.stop_ids(tokenizer)), max(seen)


LONG = "a" * 500_000
LONG_ROWS = {
    "text": (tok.encode_demonstration, {"text": LONG}),
    "completion": (tok.encode_demonstration, {"prompt": "a", "completion": LONG}),
    "prompt": (tok.encode_demonstration, {"prompt": LONG, "completion": "a"}),
    "chat": (tok.encode_demonstration, {"messages": says("a", LONG)}),
    "chat, long before": (tok.encode_demonstration, {"messages": says(LONG, "a")}),
    "chat of four": (tok.encode_demonstration, {"messages": says("a", "b", LONG, "c")}),
    "pair": (tok.encode_preference, {"prompt": "a", "chosen": LONG + "b", "rejected": LONG + "c"}),
    "pair, long prompt": (tok.encode_preference, {"prompt": LONG, "chosen": "b", "rejected": "c"}),
    "pair without a prompt": (tok.encode_preference, {"chosen": LONG + "b", "rejected": LONG + "c"}),
    "pair, one long": (tok.encode_preference, {"prompt": "a", "chosen": "b", "rejected": LONG}),
    "pair of chats": (tok.encode_preference, {"prompt": says(LONG), "chosen": says("b", first="assistant"),
                                              "rejected": says("c", first="assistant")}),
    "prompt to sample from": (tok.encode_prompt, {"prompt": LONG}),
    "chat to sample from": (tok.encode_prompt, {"prompt": says(LONG)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LONG_ROWS)
def test_long_rows_are_dropped_before_they_are_read(kind, monkeypatch):
    encode, row = LONG_ROWS[kind]
    short = {"text": "a", "prompt": "a", "chosen": "b", "rejected": "c"}
    groups, longest = longest_read(monkeypatch, [short, row, short], encode, args_of())
    assert longest < 3000  # two times the limit, of tokens of at most 12 characters, and what a template adds
    kept, counts = fit(groups, [short, row, short], MOST)
    assert counts == {"rows": 3, "kept": 2, "overlong": 1, "unscored": 0, "equal": 0, "refused": 0,
                      "longest": counts["longest"]}
    assert {group["row"] for group in kept} == {0, 2} and counts["longest"] >= 2 * MOST
    with pytest.raises(InputError, match="over --max_length 20.*row 2"):
        fit(groups, [short, row, short], MOST, "error")


def test_long_rows_of_which_a_part_is_used_are_read(monkeypatch):
    rows = [{"prompt": "b" * 9000 + "a" * 9, "completion": "c"}]
    groups, longest = longest_read(monkeypatch, rows, tok.encode_demonstration, args_of(overlong="truncate_prompt"))
    (kept,), _ = fit(groups, rows, MOST, "truncate_prompt")
    assert longest == 9010 and list(kept["prompt"]) == list(groups[0]["prompt"][-18:])
    args = args_of()
    args.split_overlong = True
    groups, longest = longest_read(monkeypatch, [{"text": "b" * 9000}], tok.encode_demonstration, args)
    assert longest == 9000 and len(split_group(groups[0], MOST)) > 400


# ---- templates and what rows give them (S13, W16) ------------------------------------------------


def test_the_time_limit_of_a_template_repeats(tmp_path):
    """jinja computes constants as it compiles, and takes any exception there, an alarm's too, for "not a constant"."""
    path = tmp_path / "slow.jinja"
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    path.write_text("{% set x = 3 ** (3 ** 16) %}" + loops)
    patch = lambda _: setattr(templates, "PATIENCE", 0.5)  # noqa: E731
    result = attempt("sft", tmp_path, "--chat_template", path, patch=patch, limit=20)
    refused(result, tmp_path, "no end after 0.5 seconds", "--chat_template FILE")


def test_no_alarm_is_left_behind():
    tokenizer = make(CHATML)
    templates.render(Row(), tokenizer, None, says("a", "b"), False)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(templates.Refusal):
        templates.render(Row(), tokenizer, None, says("a", "b"), False)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("name", ("eos_token", "bos_token", "pad_token", "image_token"))
@pytest.mark.parametrize("as_text", (False, True))
def test_a_row_does_not_set_special_tokens(name, as_text):
    """Of the flag, which is the user's, they may be part."""
    more = {"image_token": "<pad>"}  # as multimodal models have
    tokenizer = make(CHATML.replace("<|im_end|>", "{{ eos_token }}"), extra_special_tokens=more)
    extra = {name: "mine", "style": "calm"}
    row = Row(messages=says("a", "b"), chat_template_kwargs=json.dumps(extra) if as_text else extra)
    row.where = "rows.jsonl:7"
    with pytest.raises(templates.Refusal, match=f"rows.jsonl:7.*chat_template_kwargs sets {name}"):
        tok.encode_demonstration(row, tokenizer, [tokenizer.eos_token_id])
    row["chat_template_kwargs"] = {"style": "calm"}
    tok.encode_demonstration(row, tokenizer, [tokenizer.eos_token_id], {name: "mine"})


# ---- what a model folder says of itself (W15, S15, W2) -------------------------------------------

ABSURD = {
    "layers": {"num_hidden_layers": 10**9},
    "layers with kinds": {"model_type": "qwen2", "num_hidden_layers": 10**9},  # one text a layer, in the config alone
    "layers inside": {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
    "layers of an old name": {"model_type": "gpt2", "n_layer": 10**9},
    "width": {"hidden_size": 10**9}, "vocabulary": {"vocab_size": 10**9}, "vocabulary beyond": {"vocab_size": 10**18},
    "middle": {"intermediate_size": 10**12}, "heads": {"num_attention_heads": 10**9},
    "labels": {"num_labels": 10**9}, "experts": {"model_type": "mixtral", "num_local_experts": 10**9},
}  # fmt: skip


def limited(_):
    """What goes wrong must not take the machine along."""
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


def spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_configs(case, tmp_path):
    """In less than 2 seconds of a core, of which 0.5 are the way in; tokens and tensors are those of the tiny model."""
    folder = model(tmp_path, config=ABSURD[case])
    before = spent()
    result = attempt("sft", tmp_path, "--max_length", 200, "--model", folder, patch=limited, limit=30)
    seconds = spent() - before
    refused(result, tmp_path, "--model", "Pass a Hugging Face model folder")
    assert "config.json" in result.err or case in ("vocabulary beyond", "heads")  # torch and transformers say these
    assert seconds < 2


@pytest.mark.parametrize("architecture", ("LlamaForSequenceClassification", "LlamaForTokenClassification"))
@pytest.mark.parametrize("flag", ("--model", "--teacher"))
def test_a_classifier_is_no_language_model(flag, architecture, tmp_path):
    """Where the head is tied to the embedding it would load, and write nothing that means anything."""
    folder = model(tmp_path, config={"architectures": [architecture]})
    name = "experimental/gkd" if flag == "--teacher" else "sft"
    result = attempt(name, tmp_path, flag, folder, "--max_length", 200)
    refused(result, tmp_path, flag, architecture, "is a classifier")


def test_an_absurd_reward_model(tmp_path):
    folder = model(tmp_path, config={"num_hidden_layers": 10**9})
    flags = ["--reward", folder, "--num_generations", 2, "--steps_per_generation", 1, "--num_iterations", 1]
    result = attempt("grpo", tmp_path, *flags, patch=limited, limit=30)
    refused(result, tmp_path, "--reward", "num_hidden_layers 1000000000")


@pytest.mark.parametrize("changes", (
    {"stop_strings": ["a"]}, {"return_dict_in_generate": True}, {"dola_layers": "low"}, {"constraints": [1]},
    {"max_time": 1e-9, "min_length": 9, "num_beams": 3, "guidance_scale": 2.0, "cache_implementation": "static"},
), ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_generation_settings_of_a_stranger(changes, tmp_path):
    """The last samples are greedy, whatever they say, and the same as without them. A setting that cannot be saved is
    refused before step 1."""
    outputs = []
    for name, edits in (("plain", {}), ("other", changes)):
        (tmp_path / name).mkdir()
        folder = model(tmp_path / name, generation_config=edits)
        result = attempt("sft", tmp_path / name, "--max_length", 200, "--model", folder)
        if edits and result.code == 2:
            return refused(result, tmp_path / name, "generation_config.json")
        assert result.code == 0, result.err
        outputs.append([line for line in result.out.splitlines() if line.startswith("sample")])
    assert outputs[0] == outputs[1] != []


def test_addresses_of_code_are_not_passed_on(tmp_path):
    code = {"AutoConfig": "evil/repo--x.X", "AutoModelForCausalLM": "evil/repo--x.Y"}
    pipelines = {"text-generation": {"impl": "x.Z", "pt": ["AutoModelForCausalLM"]}}
    folder = model(tmp_path, config={"auto_map": code, "custom_pipelines": pipelines, "inner": {"auto_map": code}},
                   tokenizer_config={"auto_map": {"AutoTokenizer": ["evil/repo--x.T", None]}},
                   generation_config={"auto_map": code})  # fmt: skip
    result = attempt("sft", tmp_path, "--max_length", 200, "--model", folder)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    files = [path for path in out.rglob("*.json") if "trainer" not in path.parts]
    assert {path.name for path in files} >= {"config.json", "tokenizer_config.json", "generation_config.json"}
    for path in files:
        text = path.read_text()
        assert "auto_map" not in text and "evil" not in text and "custom_pipelines" not in text, path
    config = json.loads((out / "final" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["inner"] == {}
    assert len(json.loads((out / "final" / "tokenizer.json").read_text())["model"]["vocab"]) == 103


# ---- hub ids (W14) -------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(folder, calls, offline=False):
    """The hub's function over one repository, someone/model, with a branch and a tag of one commit."""
    repository = model(folder)
    (repository / "onnx").mkdir()
    (repository / "onnx" / "model.safetensors").write_bytes(b"x")
    (repository / "other.safetensors").write_bytes(b"x")

    def download(repo_id, revision=None, allow_patterns=None, dry_run=False):
        calls.append((revision, dry_run))
        assert repo_id == "someone/model" and revision in (None, "v1", COMMIT)
        files = [path for path in repository.rglob("*") if path.is_file()]
        names = [str(path.relative_to(repository)) for path in files]
        names = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        target = folder / "hub" / "snapshots" / COMMIT
        if dry_run and offline:
            raise DryRunError("Dry run cannot be performed")
        if dry_run:
            return [SimpleNamespace(file_size=(repository / name).stat().st_size,
                                    will_download=not (target / name).is_file()) for name in names]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, target / name)
        return str(target)

    return download


@pytest.mark.parametrize("name, revision", (("someone/model", None), ("someone/model@v1", "v1")))
@pytest.mark.parametrize("offline", (False, True))
def test_a_revision_and_its_commit(name, revision, offline, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model_files, "snapshot_download", hub(tmp_path, calls, offline))
    monkeypatch.setattr(model_files, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = attempt("sft", tmp_path, "--model", name, "--max_length", 200)
    assert result.code == 0, result.err
    assert f"commit    {COMMIT} of --model {name}" in result.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_commit"] == COMMIT
    found = Path(model_files.model_folder(name))
    assert calls == [(revision, True), (revision, False), (COMMIT, True), (COMMIT, False)]
    assert [path.name for path in found.rglob("*.safetensors")] == ["model.safetensors"]
    assert found.name == COMMIT and not (found / "onnx").exists()


def test_a_folder_with_an_at(tmp_path):
    folder = model(tmp_path).rename(tmp_path / "model@v1")
    result = attempt("sft", tmp_path, "--model", folder, "--max_length", 200)
    assert result.code == 0 and "commit " not in result.out, result.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_commit"] is None


def test_what_is_too_long_is_said_first():
    """Of a text that cannot fit only the beginning was read, which may hold nothing that is scored; and a row that
    loses tokens on the left changes nothing for those after it."""
    def group(row, prompt, answer, scored=None):
        completion = {"ids": array("i", range(answer)), "scored": scored}
        return {"prompt": array("i", range(prompt)), "completions": [completion], "row": row}

    groups = [group(0, 30, 2, [False, False]), group(1, 4, 2), group(2, 4, 2, [False, False])]
    kept, counts = fit(groups, groups, 10)
    assert [x["row"] for x in kept] == [1]
    assert (counts["overlong"], counts["unscored"]) == (1, 1)
    groups = [group(0, 12, 1), group(1, 8, 2), group(2, 9, 1)]
    kept, counts = fit(groups, groups, 10, "truncate_prompt")
    assert [len(x["prompt"]) for x in kept] == [9, 8, 9] and counts["overlong"] == 1


def test_a_download_that_does_not_fit(tmp_path, monkeypatch):
    """Nothing is fetched then; what is in the cache already counts as nothing."""
    calls = []
    monkeypatch.setattr(model_files, "snapshot_download", hub(tmp_path, calls))
    monkeypatch.setattr(model_files, "HF_HUB_CACHE", str(tmp_path / "cache"))
    full = SimpleNamespace(free=10_000)
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: full)
    result = attempt("sft", tmp_path, "--model", "someone/model", "--max_length", 200)
    refused(result, tmp_path, "--model someone/model", "GB to download", str(tmp_path / "cache"))
    assert not (tmp_path / "hub").exists()
    full.free = 10**9
    model_files.model_folder("someone/model")
    full.free = 0
    model_files.model_folder("someone/model")
    with pytest.raises(ValueError, match="nothing/there"):  # the hub's own words, where it does not know the name
        monkeypatch.setattr(model_files, "snapshot_download", unknown)
        model_files.model_folder("nothing/there")


def unknown(repo_id, dry_run=False, **_):
    raise DryRunError("no") if dry_run else ValueError(f"no repository {repo_id}")


# ---- between ranks (W12) -------------------------------------------------------------------------

VALUES = ["plain", None, {"a": [1, 2.5, True]}, "\u00e9\udc80 \U0001f600", "x" * 100_000]


def exchanged(rank, world):
    return [exchange(value if rank == 1 else None, torch.device("cpu"), dist.group.WORLD) for value in VALUES]


def test_ranks_exchange_json():
    for answers in ranks(2, exchanged):
        assert answers == [[None, value] for value in VALUES]


def test_nothing_is_unpickled_on_the_way_in(tmp_path):
    """The folder, the rows and an error, on two ranks, where a pickle would end the run. From the weights on it is
    torch that plans who reads and writes what, by pickles: common/README.md says so."""

    def patch(module):
        from torch.distributed import distributed_c10d

        def refuse(*_):
            raise AssertionError("a pickle")

        distributed_c10d._object_to_tensor = distributed_c10d._tensor_to_object = refuse
        module.load_weights = stop

    def stop(run, policy):
        raise InputError(f"at the weights, into {run.out}")

    data = tiny_rows("sft", tmp_path / "rows.jsonl", 8)
    bad = write_rows(tmp_path, ROW, {"prompt": "3+4="})
    for rows, needle in (data, "at the weights, into"), (bad, "mine.jsonl:2"):
        flags = ["--dataset", rows, "--eval_dataset", "", "--batch_size", 2]
        for result in try_train("sft", tmp_path / needle[:4], *flags, world=2, patch=patch):
            assert result.error.startswith("InputError: ") and needle in result.error, result.log


def test_no_source_sends_objects():
    for folder in ROOT / "common", ROOT / "methods":
        for path in folder.rglob("*.py"):
            assert not re.search(r"\w+_object(_list)?\(", path.read_text()), path
