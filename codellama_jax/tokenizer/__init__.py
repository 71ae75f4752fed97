"""Text to token ids and back. In reading order:

face        Tokenizer, and the pieces that mean something
spm_file    SentencePiece models, a tokenizer.model, as bytes
json_file   a tokenizer.json, behind the same face
training    a nano vocabulary with Llama's pieces
"""

from codellama_jax.tokenizer.face import (
    BUILDING_PIECES,
    CONTROL_PIECES,
    INFILLING_PIECES,
    NEVER_FROM_TEXT,
    SMILEY,
    SPACE,
    STEP_PIECE,
    Tokenizer,
    beside,
)

__all__ = [
    "BUILDING_PIECES",
    "CONTROL_PIECES",
    "INFILLING_PIECES",
    "NEVER_FROM_TEXT",
    "SMILEY",
    "SPACE",
    "STEP_PIECE",
    "Tokenizer",
    "beside",
]
