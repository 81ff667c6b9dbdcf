"""What classes look like is asked of a language model: a server of the test answers for it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from mllm_cl import cli
from mllm_cl.answering import Endpoint, Local, Unusable, listed, sides
from mllm_cl.data.labelled import labelled
from mllm_cl.describe import Answers, Question, describe, output_file
from mllm_cl.model.descriptions import Descriptions, read_descriptions
from mllm_cl.recipe import RecipeError
from mllm_cl.stopping import Failed

BOTH = {"classes", "pairs"}
WORDS = {"cat_1": "cat", "dog_2": "dog", "owl_3": "owl"}
KEY = "a secret"  # of nobody


class Server:
    """Answers questions, and remembers them; `turns` are given before: a status, or a text."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[str | None] = []
        self.turns: list[int | str] = []
        self.allowed = 10**6
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(self.headers.get("Authorization"))
                assert self.path == "/v1/chat/completions" and body["model"] == "wise"
                (message,) = body["messages"]
                turn = outer.turns.pop(0) if outer.turns else 200
                status = turn if isinstance(turn, int) else 200
                if len(outer.asked) >= outer.allowed:
                    status = 402
                if status == 200:
                    outer.asked.append(message["content"])
                self.send_response(status)
                if status == 418:
                    self.send_header("Content-Length", "1000")
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                text = turn if isinstance(turn, str) else outer.answer(message["content"])
                found = {"choices": [{"message": {"content": text}}]}
                self.wfile.write(json.dumps(found).encode() if status == 200 else b"no more")

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @staticmethod
    def answer(question: str) -> str:
        """As models do: with a heading of their own, and the second class first."""
        names = [name for name in WORDS.values() if f" {name} " in question]
        if len(names) == 1:
            return f"Sure!\n1. **Ears** of a {names[0]}\n2. legs"
        one, other = names
        return f"**{other.title()}:**\n- like a {other}, not a {one}\n\n{one}:\n* as a {one}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, "wise", pause=0.0, timeout=10)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_there_is_a_question_for_each_class_and_for_each_two(server, tmp_path):
    found = describe(WORDS, server.endpoint, tmp_path / "said.json", BOTH, at_once=3)
    assert len(server.asked) == len(set(server.asked)) == 3 + 3
    assert found.missing(list(WORDS), BOTH) == []
    assert found.of("cat_1") == ("Ears of a cat", "legs")
    assert found.against("dog_2", "owl_3") == ("as a dog",)
    assert found.against("owl_3", "dog_2") == ("like a owl, not a dog",)
    assert read_descriptions(tmp_path / "said.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]


def test_what_was_answered_is_not_asked_again(server, tmp_path):
    server.allowed = 4
    with pytest.raises(Failed, match=r"nothing was said of .*: .*402 .*no more"):
        describe(WORDS, server.endpoint, tmp_path / "said.json", BOTH)
    assert not (tmp_path / "said.json").exists()
    first, server.asked, server.allowed = server.asked, [], 10**6
    describe(WORDS, server.endpoint, tmp_path / "said.json", BOTH)
    assert len(first) == 4 and len(server.asked) == 2 and not set(first) & set(server.asked)


def test_a_line_that_was_cut_off_is_asked_again(server, tmp_path):
    answers = Answers.beside(tmp_path / "said.json")
    answers.add(Question(("cat_1",), ("cat",)), [["kept"]])
    with answers.path.open("a") as file:
        file.write('{"of": ["dog_2"], "sa')
    found = describe(WORDS, server.endpoint, tmp_path / "said.json", {"classes"})
    assert found.of("cat_1") == ("kept",) and found.of("dog_2") == ("Ears of a dog", "legs")
    assert len(server.asked) == 2


def test_what_is_no_answer_among_the_lines_is_named(tmp_path):
    (tmp_path / "said.json.answers.jsonl").write_text('{"of": ["cat"]}\n')
    with pytest.raises(RecipeError, match="line 1 of .* is no answer"):
        Answers.beside(tmp_path / "said.json")


def test_more_classes_are_asked_for_alone_and_nothing_is_written_over(server, tmp_path):
    path = tmp_path / "said.json"
    mine = {"cat_1": {"dog_2": ("mine",)}, "dog_2": {"cat_1": ("mine",)}}
    path.write_text(Descriptions({"cat_1": ("mine",)}, mine).text())
    found = describe(WORDS, server.endpoint, path, BOTH)
    assert len(server.asked) == 2 + 2
    assert found.of("cat_1") == found.against("dog_2", "cat_1") == ("mine",)


def test_a_file_of_something_else_is_left_alone(server, tmp_path):
    (tmp_path / "said.json").write_text('["notes"]')
    with pytest.raises(RecipeError, match="name another file"):
        describe(WORDS, server.endpoint, tmp_path / "said.json", BOTH)
    assert (tmp_path / "said.json").read_text() == '["notes"]' and not server.asked


def test_a_busy_server_is_asked_again_and_one_that_stays_busy_is_named(server, tmp_path):
    server.turns = [503, 429, 500]
    describe(WORDS, server.endpoint, tmp_path / "said.json", {"classes"})
    assert len(server.asked) == 3
    server.turns = [503] * 100
    with pytest.raises(Failed, match=r"503 .*no more \(6 times\)"):
        describe(WORDS, server.endpoint, tmp_path / "other.json", {"classes"})


def test_an_answer_that_cannot_be_read_is_asked_for_again_and_then_named(server, tmp_path):
    server.turns = ["I will not say.", "- a\n- b"]
    found = describe({"cat": "cat"}, server.endpoint, tmp_path / "said.json", {"classes"})
    assert found.of("cat") == ("a", "b")
    server.turns = ["I will not say."] * 3
    with pytest.raises(Failed, match=r"3 answers about dog: .*'I will not say\.'"):
        describe({"dog": "dog"}, server.endpoint, tmp_path / "said.json", {"classes"})


def test_a_server_that_is_not_there_is_not_waited_for(tmp_path):
    nobody = Endpoint("http://localhost:1/v1", "wise", pause=600.0)
    with pytest.raises(Failed, match="is the server running there"):
        describe(WORDS, nobody, tmp_path / "said.json", {"classes"})


def test_no_redirection_is_followed(server, tmp_path):
    server.turns = [302]
    with pytest.raises(Failed, match="302"):
        describe(WORDS, server.endpoint, tmp_path / "said.json", {"classes"})


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:8000/v1", "http://", "ftp://a/v1"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="expected an address"):
        Endpoint(url, "wise")


def test_an_error_that_is_cut_off_is_told_as_far_as_it_came(server, tmp_path):
    server.turns = [418]
    with pytest.raises(Failed, match="said 418 .*: no more"):
        describe(WORDS, server.endpoint, tmp_path / "said.json", {"classes"})


def test_what_is_said_to_this_machine_passes_no_proxy(server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert server.endpoint("What of a cat ?", 0)


@pytest.mark.parametrize("url", [f"https://me:{KEY}@models.example/v1", f"https://a/v1?key={KEY}"])
def test_a_key_in_an_address_is_refused_and_not_told(url):
    with pytest.raises(ValueError, match="under --key-variable") as caught:
        Endpoint(url, "wise")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r", f"{KEY}…"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_told(key):
    with pytest.raises(ValueError, match="no key has") as caught:
        Endpoint("https://models.example/v1", "wise", key)
    assert KEY not in str(caught.value)


def test_a_key_goes_over_no_open_line():
    with pytest.raises(ValueError, match="take https"):
        Endpoint("http://models.example/v1", "wise", KEY)
    for url in ("https://models.example/v1", "http://localhost:1/v1", "http://[::1]:1/v1"):
        assert KEY not in repr(Endpoint(url, "wise", KEY))


def test_the_command_writes_the_file_that_a_recipe_names(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("SAID", str(tmp_path))
    tree = {
        "model": {"model_name_or_path": "somewhere/some-clip"},
        "method": {"name": "engine", "text_des": 0},
        "classes": {"data": "toy:compositions", "number": 2, "increment": 1},
    }
    tree["classes"]["descriptions"] = "${SAID}/said.json"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    one, other = labelled("toy:compositions", "train", 1, number=2).names
    server.turns = [f"{one}:\n- a\n{other}:\n- b"]
    words = ["describe", str(path), "--endpoint", server.url, "--model", "wise"]
    assert cli.main([*words, "--key-variable", "MY_KEY"]) == 0
    found = read_descriptions(tmp_path / "said.json")
    assert found.against(one, other) == ("a",) and found.against(other, one) == ("b",)
    assert not found.classes and server.headers == [f"Bearer {KEY}"]
    assert f"descriptions: {tmp_path}/said.json" in capsys.readouterr().out
    assert cli.main(words) == 0 and len(server.asked) == 1
    server.allowed = 0
    assert cli.main([*words, "--key-variable", "MY_KEY", "--output", str(tmp_path / "b.json")]) == 1
    told = capsys.readouterr()
    assert "402" in told.err and KEY not in told.out + told.err


def test_a_recipe_that_names_no_file_needs_one_on_the_command_line(tmp_path, capsys):
    path = Path(__file__).parent.parent / "recipes" / "quickstart_cil.yaml"
    assert (
        cli.main(["describe", str(path), "--endpoint", "http://localhost:1", "--model", "a"]) == 2
    )
    assert "give --output FILE" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["toy:compositions", "${SAID}", "data/${SAID}.json"])
def test_what_is_no_file_of_ones_own_is_not_written_to(named):
    with pytest.raises(RecipeError, match="give --output FILE"):
        output_file("recipe.yaml", named, None)
    assert output_file("recipe.yaml", named, "said.json") == Path("said.json")


def test_classes_of_the_same_words_are_not_compared(server, tmp_path):
    words = {"bird": "crane", "machine": "Crane"}
    server.turns = ["- a", "- b"]
    found = describe(words, server.endpoint, tmp_path / "one.json", {"classes"})
    assert found.of("bird") and found.of("machine")
    with pytest.raises(RecipeError, match="bird and machine are both called 'crane'"):
        describe(words, server.endpoint, tmp_path / "two.json", BOTH)
    assert len(server.asked) == 2


def test_a_model_of_this_machine_answers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from clip import END, tokenizer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ask = Local(str(tmp_path), max_new_tokens=8)
    assert ask("a red circle", 0) == ask("a red circle", 0)
    assert isinstance(ask("a red circle", 1), str)
    with pytest.raises(ValueError, match="has no language model"):
        Local(str(tmp_path / "none"))
    own = ask.tokens("a red circle")["input_ids"][0].tolist()
    assert own.count(END) == 1
    ask.tokenizer.chat_template = "{{ messages[0].content }}[END]a"
    chat = ask.tokens("a red circle")["input_ids"][0].tolist()
    assert chat == [*own, own[0]]  # no second end


# What can be read


@pytest.mark.parametrize(
    "answer",
    [
        "- slit pupils\n- a long tail",
        "Here are some:\n1. Slit pupils.\n2) **a long tail**\n\nI hope this helps!",
        "<think>\n- what is a cat?\n</think>\n```\n* slit pupils;\n• a long tail,\n```",
        "- what is a cat?</think>\n- slit pupils\n- a long tail<think>- more",
    ],
)
def test_a_list_is_read_in_the_forms_that_models_give_it(answer):
    assert [entry.lower() for entry in listed(answer)] == ["slit pupils", "a long tail"]


@pytest.mark.parametrize("answer", ["", "A cat has a tail.", "<think>- a tail", "-\n- "])
def test_what_is_no_list_is_not_taken_for_one(answer):
    with pytest.raises(Unusable):
        listed(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Wild cat:\n- tall\n- shy\nCat:\n- tame",
        "### CAT\n- tame\n### Wild Cat\n1. tall\n2. shy",
        "1. **Wild cat:**\n   - tall\n   - shy\n2. **Cat:**\n   - tame\n\nBoth:\n- fur",
        "Visual features of the wild cat:\n* tall\n* shy\nVisual features of the cat:\n* tame",
        "Differences between cat and wild cat:\n\ncat:\n- tame\n\nwild cat:\n- tall\n- shy",
    ],
)
def test_two_lists_are_told_apart_by_their_names(answer):
    assert sides(answer, "wild cat", "cat") == [["tall", "shy"], ["tame"]]


def test_two_lists_without_names_are_taken_as_they_come():
    answer = "The first animal:\n- tall\nThe second animal:\n- tame"
    assert sides(answer, "wild cat", "cat") == [["tall"], ["tame"]]


@pytest.mark.parametrize(
    "answer",
    ["cat:\n- tame", "- tall\n- tame", "cat:\n- tame\nwild cat:\n", "a:\n- 1\nb:\n- 2\nc:\n- 3"],
)
def test_lists_that_cannot_be_told_apart_are_not_guessed(answer):
    with pytest.raises(Unusable, match="no list under"):
        sides(answer, "wild cat", "cat")
