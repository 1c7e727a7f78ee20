"""The options of one request, shared by all dialects: Ollama's `api.Options`.

A parent merges its defaults before it sends the object and leaves zero-valued fields out, so an absent field is 0, not
a default. Only where the whole object is absent do Ollama's defaults apply.
"""

from protocol.gojson import Bool, Float32, GoModel, Int, Str, Strings


class PictureFields(GoModel):
    """What a request for pictures may say beyond Ollama's fields, in `options` or beside them. None: it is unsaid."""

    negative_prompt: Str | None = None
    guidance: Float32 | None = None
    strength: Float32 | None = None
    preview: Int | None = None
    """Every so many steps the progress shall carry a small picture."""
    format: object = None
    """png, jpeg or webp. Requests for text have another field of this name."""
    n: Int | None = None
    """How many pictures."""
    step_cache: Float32 | None = None


class Options(PictureFields):
    """Sampling, lengths and hints, in snake_case as every parent writes them."""

    num_keep: Int = 0
    seed: Int = 0
    num_predict: Int = 0
    top_k: Int = 0
    top_p: Float32 = 0.0
    min_p: Float32 = 0.0
    typical_p: Float32 = 0.0
    repeat_last_n: Int = 0
    temperature: Float32 = 0.0
    repeat_penalty: Float32 = 0.0
    presence_penalty: Float32 = 0.0
    frequency_penalty: Float32 = 0.0
    stop: Strings = ()
    num_ctx: Int = 0
    num_batch: Int = 0
    num_gpu: Int = 0
    main_gpu: Int | None = None
    use_mmap: Bool | None = None
    num_thread: Int = 0
    draft_num_predict: Int = 0
