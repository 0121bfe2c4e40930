"""Tokenizers of other kinds than byte-level ones: right labels, or a reason why there are none."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tunewright.errors import DataError
from tunewright.trainer.data.encode import Encoder
from tunewright.trainer.data.formats import Conversation, Plain
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.render import IGNORED, Renderer
from tunewright.trainer.data.templating import TemplatedText

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
PROMPTED = TEMPLATE + "{% if add_generation_prompt %}[assistant] {% endif %}"
TURNS = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "two of them"}]
ASKED = Conversation(TURNS, [False, True])


def sentencepiece_like(prepend: str) -> Any:
    """A tokenizer as Llama's: a mark for each space, and one before the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    texts = ["[user] how many of them [assistant] two of them"] * 3
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = PROMPTED
    return wrapped


class Letters(PreTrainedTokenizer):
    """A tokenizer written in Python: a token for each letter, or for each pair of letters."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.ids = size, {"</s>": 0}
        super().__init__(eos_token="</s>")
        self.chat_template = PROMPTED

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [text[start : start + self.size] for start in range(0, len(text), self.size)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.setdefault(token, len(self.ids))

    def _convert_id_to_token(self, index: int) -> str:
        return {number: token for token, number in self.ids.items()}[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def learnt(tokenizer: Any, example: Any) -> str:
    return "".join(tokenizer.decode([label for label in example.labels.tolist() if label != IGNORED]).split())


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_a_tokenizer_with_marks_for_spaces_learns_the_answer(prepend: str) -> None:
    tokenizer = sentencepiece_like(prepend)
    (examples,) = Renderer(tokenizer, 1000).render([ASKED])
    assert not isinstance(examples, Unusable)
    assert examples[0].input_ids.tolist() == tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert learnt(tokenizer, examples[0]) == "twoofthem</s>"


@pytest.mark.parametrize(("prepend", "kept"), [("first", False), ("always", True), ("never", True)])
def test_a_special_tokens_string_stays_text_or_drops_the_row(prepend: str, kept: bool) -> None:
    tokenizer = sentencepiece_like(prepend)
    messages = [*TURNS, {"role": "user", "content": "how </s> many"}, {"role": "assistant", "content": "two"}]
    (examples,) = Renderer(tokenizer, 1000).render([Conversation(messages, [False, True, False, True])])
    if not kept:  # a part of the text would begin with another token than it does in the whole
        assert isinstance(examples, Unusable)
        assert "cannot keep as text" in str(examples)
        return
    assert not isinstance(examples, Unusable)
    assert examples[0].input_ids.tolist().count(tokenizer.eos_token_id) == 4
    assert learnt(tokenizer, examples[0]) == "twoofthem</s>two</s>"


def test_a_tokenizer_in_python_learns_the_answer() -> None:
    tokenizer = Letters()
    (examples,) = Renderer(tokenizer, 1000).render([ASKED])
    assert not isinstance(examples, Unusable)
    assert learnt(tokenizer, examples[0]) == "twoofthem</s>"


def test_a_tokenizer_in_python_that_hides_its_borders_is_refused() -> None:
    text = "abcdef"
    with pytest.raises(DataError, match=r"does not tell where its tokens begin.*tokenizer\.json"):
        list(Encoder(Letters(size=2)).encode([TemplatedText(text, [(3, 6)], Plain("", text))]))
