//go:build !before_v0_34_2 && !classic

package main

import "github.com/ollama/ollama/mlxrunner"

// CompletionResponse is what the client decodes a line into.
type CompletionResponse = mlxrunner.CompletionResponse
