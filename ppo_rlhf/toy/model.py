"""A tokenizer and a tiny GPT-2 made on the spot: the embedded task's stand-in for a model from the Hub."""

from typing import TYPE_CHECKING

from ppo_rlhf.toy import corpus

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

EOS, PAD = "<|eos|>", "<|pad|>"
VOCABULARY_SIZE = 2_000
NUM_POSITIONS = 128


def tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer trained on the demonstrations: most of their words are one token, any text survives.

    Pads on the left, as generation needs. `<|eos|>` also serves as the beginning-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in corpus.demonstrations()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=NUM_POSITIONS,
        clean_up_tokenization_spaces=False,  # the clean-up would rewrite " ." and break the round trip
    )


def policy() -> "tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]":
    """A GPT-2 of 1.3 million random weights from torch's global generator, and its tokenizer.

    Wide and shallow: within a minute on one core, two layers of 192 learn this grammar better than four of 128.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    made = tokenizer()
    config = GPT2Config(
        vocab_size=len(made),
        n_positions=NUM_POSITIONS,
        n_embd=192,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    return GPT2LMHeadModel(config), made
