"""Text to batches: documents, their split, tokenizers, the token stream and packed windows of it."""

from resolvent.data.corpus import EOT, load_documents
from resolvent.data.split import split_documents
from resolvent.data.stream import TokenStream, encode_documents
from resolvent.data.tokenization import build_tokenizer, load_tokenizer, save_tokenizer
from resolvent.data.windows import Batch, MixedBatches, PackedBatches, documents_as_windows

__all__ = [
    "EOT",
    "Batch",
    "MixedBatches",
    "PackedBatches",
    "TokenStream",
    "build_tokenizer",
    "documents_as_windows",
    "encode_documents",
    "load_documents",
    "load_tokenizer",
    "save_tokenizer",
    "split_documents",
]
