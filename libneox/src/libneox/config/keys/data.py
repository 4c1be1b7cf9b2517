# SPDX-License-Identifier: Apache-2.0
"""Keys that say what is trained on: tokenizer, datasets, blending, packing, order."""

from dataclasses import dataclass
from typing import Literal

from libneox.config.key import ignored, key

Paths = list[str]
Weights = list[float]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Which tokenizer made the data. Normally nobody needs to say: the dataset carries its own."""

    tokenizer: str | None = key(
        None, "Tokenizer file, directory or `bytes`; default: the one stored beside the dataset. New."
    )
    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "HFGPT2Tokenizer",
        "SPMTokenizer",
        "CharLevelTokenizer",
        "TiktokenTokenizer",
    ] = key("GPT2BPETokenizer", "Kind of vocab_file, as GPT-NeoX names it.")
    vocab_file: str | None = key(None, "Vocabulary: tokenizer.json, vocab.json or a sentencepiece model.")
    merge_file: str | None = key(None, "Merges of a vocab.json, found beside it; a file elsewhere is an error.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Datasets: where they are, how they are cut, blended, packed and ordered."""

    data_path: str | None = key(None, "One dataset prefix (PREFIX.bin and PREFIX.idx), cut by `split`.")
    split: str = key("969, 30, 1", "Shares of data_path for training, validation and test.")
    train_data_paths: Paths | None = key(None, "Dataset prefixes to train on; excludes data_path.")
    valid_data_paths: Paths | None = key(None, "Dataset prefixes to validate on.")
    test_data_paths: Paths | None = key(None, "Dataset prefixes to test on.")
    train_data_weights: Weights | None = key(None, "Blend weights of train_data_paths; default equal.")
    valid_data_weights: Weights | None = key(None, "Blend weights of valid_data_paths; default equal.")
    test_data_weights: Weights | None = key(None, "Blend weights of test_data_paths; default equal.")
    weight_by_num_documents: bool = key(False, "Derive the weights from document counts.")
    weighted_sampler_alpha: float = key(1.0, "Exponent of the document counts: 1 proportional, 0 uniform.", minimum=0)

    train_label_data_paths: Paths | None = key(None, "Labels of train_data_paths: -100 is no loss.")
    valid_label_data_paths: Paths | None = key(None, "Labels of valid_data_paths.")
    test_label_data_paths: Paths | None = key(None, "Labels of test_data_paths.")
    train_reward_data_paths: Paths | None = key(None, "Rewards of train_data_paths, one a document.")
    valid_reward_data_paths: Paths | None = key(None, "Rewards of valid_data_paths.")
    test_reward_data_paths: Paths | None = key(None, "Rewards of test_data_paths.")
    pos_train_data_paths: Paths | None = key(None, "Preferred answers to train on.")
    neg_train_data_paths: Paths | None = key(None, "Rejected answers, aligned with the preferred ones.")
    pos_valid_data_paths: Paths | None = key(None, "Preferred answers to validate on.")
    neg_valid_data_paths: Paths | None = key(None, "Rejected answers to validate on.")
    pos_test_data_paths: Paths | None = key(None, "Preferred answers to test on.")
    neg_test_data_paths: Paths | None = key(None, "Rejected answers to test on.")
    pos_train_label_data_paths: Paths | None = key(None, "Labels of pos_train_data_paths.")
    neg_train_label_data_paths: Paths | None = key(None, "Labels of neg_train_data_paths.")
    pos_valid_label_data_paths: Paths | None = key(None, "Labels of pos_valid_data_paths.")
    neg_valid_label_data_paths: Paths | None = key(None, "Labels of neg_valid_data_paths.")
    pos_test_label_data_paths: Paths | None = key(None, "Labels of pos_test_data_paths.")
    neg_test_label_data_paths: Paths | None = key(None, "Labels of neg_test_data_paths.")

    dataset_impl: Literal["gpt2", "pairwise", "online"] = key(
        "gpt2", "Kind of dataset: token sequences, preference pairs, or samples from a server."
    )
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = key(
        "packed", "How documents fill a sample: cut anywhere, whole until one does not fit, or one each."
    )
    allow_chopped: bool = key(True, "Whether documents longer than a sample are cut; false leaves them out.")
    order: Literal["neox", "hash"] = key(
        "neox", "Order of samples: GPT-NeoX's, sample for sample, or a keyed bijection that needs no memory. New."
    )
    eod_mask_loss: bool = key(False, "No loss where the input token is end-of-document.")
    document_mask: bool = key(
        False,
        "Attention stays within a document; on a GPU in half precision by torch's kernel for sequences of various "
        "lengths, unless attention_kernel is torch, efficient or math or more is asked of attention. New.",
    )
    reset_position_ids: bool = key(False, "Positions start at 0 in every document. New.")
    data_impl: Literal["infer", "mmap", "cached"] = key(
        "infer", "Dataset format. It is read from the file; `cached` (TNTIDX) is an error."
    )
    num_workers: int = ignored(
        2, "Loader processes.", "samples are slices of a memory map, read without worker processes"
    )
    mmap_warmup: bool = ignored(False, "Read datasets through once.", "the page cache fills itself as samples are read")
    use_shared_fs: bool = ignored(True, "Whether all nodes see one file system.", "there are no index files to share")
    short_seq_prob: float = ignored(0.1, "Share of short samples (BERT).", "GPT-NeoX never reads it")
    online_dataserver_ips: str | list[str] = key("localhost", "Hosts of sample servers.")
    online_dataserver_ports: int | list[int] = key(10000, "Ports of sample servers.")
