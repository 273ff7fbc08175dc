"""The recipe of `tiny`: a small LLaVA and its processor, built from nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from avlprof.tasks.shapes.questions import QUESTIONS
from avlprof.tasks.shapes.scene import CELLS, COLORS, IMAGE_SIZE, KINDS, PATCH_SIZE, SHAPES, Frame
from tools.tiny_model.recipe import Prefix, Recipe, flat_positions

_CHAT_TEMPLATE = """{% for m in messages %}{% if m['role'] == 'user' %}USER: \
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] if c['type'] == 'image' %}<image>
{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}\
{% else %} ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{{ m['content'][0]['text'] }}{% endif %}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %} ASSISTANT:{% endif %}"""


class LlavaRecipe(Recipe):
    """LLaVA 1.5: one resolution, a CLIP tower, and positions that count up."""

    def build_processor(self) -> LlavaProcessor:
        return build_processor()

    def build_model(self, seed: int) -> LlavaForConditionalGeneration:
        return build_model(self.processor, seed)

    def tower(self, model: PreTrainedModel) -> nn.Module:
        tower: nn.Module = model.model.vision_tower
        return tower

    def features(self, model: PreTrainedModel, pixels: Mapping[str, Tensor]) -> Tensor:
        hidden: Tensor = model.model.vision_tower(pixels["pixel_values"]).last_hidden_state
        return hidden[:, 1:]

    def projected(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        projected: Tensor = model.model.multi_modal_projector(features)
        return projected

    def settle(self, model: PreTrainedModel) -> None:
        """Nothing: projector and decoder start at random."""

    def prefix(self, frame: Frame) -> Prefix:
        ids = self.picture_ids("USER: ", "<image>", "", frame)
        return Prefix(ids, flat_positions(len(ids)), len(ids))


def build_processor() -> LlavaProcessor:
    """Byte-level BPE trained on the question templates, and CLIP's image processor.

    Words of pictures are upper case and never part of the training text, so they are
    read and written letter by letter.
    """
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_template_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", specials.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["USER:", "ASSISTANT:"],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of about 3 million parameters: 196 vision tokens, 6 decoder layers, GQA 6/2."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    _init_vision(model)
    return model


def _init_vision(model: LlavaForConditionalGeneration) -> None:
    """A 2D sine-cosine start of the position embeddings and a wide patch convolution.

    With CLIP's own initialisation a tower this small did not learn to tell characters.
    """
    embeddings = model.model.vision_tower.embeddings
    grid, width = IMAGE_SIZE // PATCH_SIZE, embeddings.embed_dim
    frequency = torch.exp(torch.arange(width // 4) * (-math.log(1e4) / (width // 4)))
    angle = torch.arange(grid)[:, None] * frequency[None]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    down = axis[:, None].expand(grid, grid, -1)
    across = axis[None].expand(grid, grid, -1)
    with torch.no_grad():
        torch.nn.init.normal_(embeddings.patch_embedding.weight, std=0.05)
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:] = (
            torch.cat([down, across], dim=-1).reshape(grid * grid, width) * 0.5
        )


def _template_text() -> list[str]:
    words = [
        *COLORS,
        *SHAPES,
        *KINDS,
        *CELLS,
        "middle",
        "yes",
        "no",
        "row",
        "object",
        "objects",
        "text",
        "image",
    ]
    lines = [f" {word}" for word in words for _ in range(20)]
    lines += [f"{word}" for word in (*COLORS, *SHAPES, *CELLS, "yes", "no")]
    questions = [
        "describe the image.",
        "read all the text.",
        "list the colors.",
        "what is in the top row?",
        "what is at the top left?",
        "where is the red circle?",
        "what color is the circle?",
        "what color is the word",
        "what shape is red?",
        "what text is red?",
        "how many objects are there?",
        "is there a red object?",
        "red circle at top left, blue word at center",
    ]
    assert len(questions) > len(QUESTIONS)
    return lines + [q for q in questions for _ in range(20)]
