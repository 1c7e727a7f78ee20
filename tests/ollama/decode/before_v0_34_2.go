//go:build before_v0_34_2

package main

import "github.com/ollama/ollama/x/mlxrunner"

// CompletionResponse is what the client decodes a line into.
type CompletionResponse = mlxrunner.CompletionResponse
