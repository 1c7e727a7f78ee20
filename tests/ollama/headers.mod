module headers

go 1.26.0

// Ollama v0.24.0 includes C++ headers from folders called vendor, and those Go leaves out of modules. They need no other
// release than these: a JSON parser and a reader of pictures, which older versions of Ollama kept elsewhere (this is the
// last of them), and a reader of sounds.
require (
	github.com/gen2brain/malgo v0.11.24
	github.com/ollama/ollama v0.11.4
)
