"""The processors of every family as transformers builds them, small, for the random models of the tests.

Nothing is fetched: a processor is made of its own classes, with small sizes that fit the model, a
tokenizer of single characters with the family's special tokens, and the family's chat template as
its checkpoints have it (system prompts and tools left out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from avlprof.testing.models import BOS, FIRST_WORD, IMAGE, PAD, VIDEO, VOCABULARY

NEAREST = 0
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGIMORSTUWY 0123456789.,?:\n"
START, END = VOCABULARY - 1, VOCABULARY - 2  # of a picture or a video, where the model's config names them
FINE = [[12, 24], [24, 12], [24, 24], [12, 36], [60, 60]]


def chat_template(begin: str, role: str, image: str, video: str, end: str, ask: str) -> str:
    """Messages one after the other; `role` is an expression of `m`, a message."""
    shown = (
        f"{{% if c['type'] == 'image' %}}{image}{{% elif c['type'] == 'video' %}}{video}"
        "{% else %}{{ c['text'] }}{% endif %}"
    )
    return (
        f"{begin}{{% for m in messages %}}{role}{{% for c in m['content'] %}}{shown}{{% endfor %}}{end}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


IM_START, IM_END = "<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n"
QWEN = chat_template(
    "", IM_START, "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>", IM_END, "<|im_start|>assistant\n",
)  # fmt: skip
GLM = chat_template(
    "[gMASK]<sop>", "<|{{ m['role'] }}|>\n", "<|begin_of_image|><|image|><|end_of_image|>",
    "<|begin_of_video|><|video|><|end_of_video|>", "", "<|assistant|>\n",
)  # fmt: skip
ONEVISION = chat_template("", IM_START, "<image>\n", "<video>\n", IM_END, "<|im_start|>assistant\n")
INTERNVL = chat_template(
    "", IM_START, "<IMG_CONTEXT>\n", "<video>\n", IM_END, "<|im_start|>assistant\n"
)  # fmt: skip
LLAVA = chat_template("", "{{ m['role'] | upper }}: ", "<image>\n", "", " ", "ASSISTANT:")
PIXTRAL = chat_template(
    "", "{{ '[INST]' if m['role'] == 'user' }}", "[IMG]", "", "{{ '[/INST]' if m['role'] == 'user' }}", ""
)
AYA = chat_template("", "{{ m['role'] }}: ", "<image>", "", "\n", "assistant:")
GEMMA = chat_template(
    "<s>",
    "<start_of_turn>{{ m['role'] }}\n",
    "<start_of_image>",
    "",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
)
SMOLVLM = chat_template(
    "<|im_start|>", "{{ m['role'] | capitalize }}:", "<image>", "<video>", "<end_of_utterance>\n",
    "Assistant:",
)  # fmt: skip


def tokenizer(named: dict[str, str], fixed: dict[str, int], others: tuple[str, ...] = ()) -> Any:
    """A tokenizer of single characters.

    `named` are special tokens that the processor asks for by name (`image_token`), `others` those
    that it writes, and `fixed` the ids of those that the model's config names.
    """
    ids = {"<pad>": PAD, "<s>": BOS, **fixed}
    rest = [*LETTERS, *(token for token in (*named.values(), *others) if token not in ids)]
    free = (number for number in range(FIRST_WORD, VOCABULARY) if number not in ids.values())
    ids |= dict(zip(rest, free, strict=False))
    assert len(ids) == len(rest) + 2 + len(fixed) <= VOCABULARY
    unused = (number for number in range(VOCABULARY) if number not in ids.values())
    ids |= {f"<unused{number}>": number for number in list(unused)}  # what a processor adds comes behind
    core = Tokenizer(BPE(vocab=ids, merges=[], unk_token="<pad>"))
    core.decoder = decoders.Fuse()
    special = [token for token in ids if len(token) > 1]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<pad>",
        extra_special_tokens=named,
    )


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}, "resample": NEAREST}


def clip(side: int) -> Any:
    return hf.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=NEAREST
    )


def llava(letters: Any) -> Any:
    return hf.LlavaProcessor(
        clip(20), letters, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA,
    )  # fmt: skip


def llava_next(letters: Any) -> Any:
    cutter = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=FINE,
        resample=NEAREST,
    )  # fmt: skip
    return hf.LlavaNextProcessor(
        cutter, letters, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA,
    )  # fmt: skip


def llava_onevision(letters: Any) -> Any:
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(**square(12), image_grid_pinpoints=FINE), letters,
        hf.LlavaOnevisionVideoProcessor(**square(12)), num_image_tokens=9,
        vision_feature_select_strategy="full", chat_template=ONEVISION,
    )  # fmt: skip


FLAT = {"patch_size": 4, "merge_size": 2, "resample": NEAREST}
SMALL = {"shortest_edge": 1024, "longest_edge": 4096}
LONG = {"shortest_edge": 1024, "longest_edge": 40960}


def qwen2_vl(letters: Any) -> Any:
    films = hf.Qwen2VLVideoProcessor(**FLAT, size=LONG)
    return hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(**FLAT, size=SMALL), letters, films, chat_template=QWEN
    )


def qwen2_5_vl(letters: Any) -> Any:
    films = hf.Qwen2VLVideoProcessor(**FLAT, size=LONG)
    return hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**FLAT, size=SMALL), letters, films, chat_template=QWEN
    )


def qwen3_vl(letters: Any) -> Any:
    films = hf.Qwen3VLVideoProcessor(**FLAT, size=LONG)
    return hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**FLAT, size=SMALL), letters, films, chat_template=QWEN
    )


def glm4v(letters: Any) -> Any:
    films = hf.Glm4vVideoProcessor(**FLAT, size=LONG)
    return hf.Glm4vProcessor(hf.Glm4vImageProcessor(**FLAT, size=SMALL), letters, films, chat_template=GLM)


def internvl(letters: Any) -> Any:
    cutter = hf.GotOcr2ImageProcessor(**square(24), crop_to_patches=True, min_patches=1, max_patches=6)
    films = hf.InternVLVideoProcessor(**square(24))
    return hf.InternVLProcessor(cutter, letters, films, image_seq_length=9, chat_template=INTERNVL)


PARTS = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}, "resample": NEAREST}


def idefics3(letters: Any) -> Any:
    return hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(**PARTS), letters, image_seq_len=9, chat_template=SMOLVLM
    )


def smolvlm(letters: Any) -> Any:
    return hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**PARTS), letters, hf.SmolVLMVideoProcessor(**PARTS), image_seq_len=9,
        chat_template=SMOLVLM,
    )  # fmt: skip


def mistral3(letters: Any) -> Any:
    cutter = hf.PixtralImageProcessor(
        patch_size={"height": 4, "width": 4}, size={"longest_edge": 64}, resample=NEAREST
    )
    return hf.PixtralProcessor(cutter, letters, patch_size=4, spatial_merge_size=2, chat_template=PIXTRAL)


def aya_vision(letters: Any) -> Any:
    cutter = hf.GotOcr2ImageProcessor(**square(32), crop_to_patches=True, min_patches=1, max_patches=6)
    return hf.AyaVisionProcessor(
        cutter, letters, patch_size=4, img_size=32, downsample_factor=2, chat_template=AYA
    )


def gemma3(letters: Any) -> Any:
    return hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(**square(32)), letters, image_seq_length=16, chat_template=GEMMA
    )


def paligemma(letters: Any) -> Any:
    cutter = hf.SiglipImageProcessor(**square(20))
    cutter.image_seq_length = 25
    return hf.PaliGemmaProcessor(cutter, letters)


IMAGE_TAG = {"image_token": "<image>"}
BOTH_TAGS = {"image_token": "<image>", "video_token": "<video>"}
QWEN_TAGS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_IDS = dict(zip(QWEN_TAGS.values(), (IMAGE, VIDEO, START, END), strict=True))
IM = ("<|im_start|>", "<|im_end|>")
IDEFICS = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip


@dataclass(frozen=True)
class Real:
    """A family's processor and the random model that fits it.

    `named`, `fixed` and `others` are as in `tokenizer`; `films` says whether it takes videos,
    `together` whether one prompt may hold pictures and videos.
    """

    model: str
    make: Callable[[Any], Any]
    named: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    films: bool = False
    together: bool = True

    def processor(self) -> Any:
        return self.make(tokenizer(self.named, self.fixed, self.others))


REAL = {
    "llava": Real("llava-4q2kv", llava, IMAGE_TAG, {"<image>": IMAGE}),
    "vipllava": Real("vipllava", llava, IMAGE_TAG, {"<image>": IMAGE}),
    "llava_next": Real("llava_next", llava_next, IMAGE_TAG, {"<image>": IMAGE}),
    "llava_onevision": Real(
        "llava_onevision", llava_onevision, BOTH_TAGS, {"<image>": IMAGE, "<video>": VIDEO}, IM, films=True
    ),
    "qwen2_vl": Real("qwen2_vl", qwen2_vl, QWEN_TAGS, QWEN_IDS, IM, films=True),
    "qwen2_5_vl": Real("qwen2_5_vl-6q2kv", qwen2_5_vl, QWEN_TAGS, QWEN_IDS, IM, films=True),
    "qwen3_vl": Real("qwen3_vl", qwen3_vl, QWEN_TAGS, QWEN_IDS, IM, films=True),
    "glm4v": Real(
        "glm4v", glm4v, {"image_token": "<|image|>", "video_token": "<|video|>"},
        {"<|image|>": IMAGE, "<|video|>": VIDEO, "<|begin_of_video|>": START, "<|end_of_video|>": END},
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>"),
        films=True, together=False,
    ),
    "internvl": Real(
        "internvl", internvl,
        {
            "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>",
            "end_image_token": "</img>", "video_token": "<video>",
        },
        {"<IMG_CONTEXT>": IMAGE}, IM, films=True,
    ),
    "idefics3": Real("idefics3", idefics3, IMAGE_TAG, {"<image>": IMAGE}, IDEFICS),
    "smolvlm": Real(
        "smolvlm", smolvlm, BOTH_TAGS, {"<image>": IMAGE}, IDEFICS, films=True, together=False
    ),
    "mistral3": Real(
        "mistral3", mistral3, {"image_token": "[IMG]"}, {"[IMG]": IMAGE},
        ("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    ),
    "aya_vision": Real(
        "aya_vision", aya_vision, {}, {"<|IMG_PATCH|>": IMAGE},
        ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL", *(f"TILE_{n}" for n in range(1, 7))),
    ),
    "gemma3": Real(
        "gemma3", gemma3,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {"<image_soft_token>": IMAGE}, ("<start_of_turn>", "<end_of_turn>"),
    ),
    "paligemma": Real("paligemma", paligemma, IMAGE_TAG, {"<image>": IMAGE}),
    "paligemma2": Real("paligemma2", paligemma, IMAGE_TAG, {"<image>": IMAGE}),
}  # fmt: skip
