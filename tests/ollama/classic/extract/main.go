// Command extract copies the declarations of the classic dialect's requests and answers out of Ollama's llm package.
//
// That package cannot be built as a module: it needs C++ headers in folders called "vendor", and those are left out of
// modules. Its types need none of them. Usage: extract FOLDER-OF-LLM > FILE.go
package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"path/filepath"
	"strings"
)

var wanted = []string{
	"LoadOperation", "LoadRequest", "LoadResponse", "ServerStatus", "ServerStatusResponse", "ImageData",
	"CompletionRequest", "CompletionResponse", "DoneReason", "TokenLogprob", "Logprob",
	"EmbeddingRequest", "EmbeddingResponse",
}

var imports = map[string]string{
	"json": "encoding/json",
	"time": "time",
	"api":  "github.com/ollama/ollama/api",
	"ml":   "github.com/ollama/ollama/ml",
}

func main() {
	files := token.NewFileSet()
	file, err := parser.ParseFile(files, filepath.Join(os.Args[1], "server.go"), nil, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
	missing := map[string]bool{}
	for _, name := range wanted {
		missing[name] = true
	}
	var body strings.Builder
	used := map[string]bool{}
	for _, declaration := range file.Decls {
		general, ok := declaration.(*ast.GenDecl)
		if !ok || !isWanted(general, missing) {
			continue
		}
		ast.Inspect(general, func(node ast.Node) bool {
			if selector, ok := node.(*ast.SelectorExpr); ok {
				if name, ok := selector.X.(*ast.Ident); ok {
					used[name.Name] = true
				}
			}
			return true
		})
		printer.Fprint(&body, files, general)
		body.WriteString("\n\n")
	}
	if len(missing) > 0 {
		fmt.Fprintln(os.Stderr, "Error: not found:", missing)
		os.Exit(1)
	}
	fmt.Print("//go:build classic\n\npackage main\n\n")
	for name := range used {
		fmt.Printf("import %s %q\n", name, imports[name])
	}
	fmt.Print("\n", body.String())
}

// isWanted reports types by their own name and constants by the name of their type, and crosses out what it found.
func isWanted(declaration *ast.GenDecl, missing map[string]bool) bool {
	for _, spec := range declaration.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			for _, name := range wanted {
				if spec.Name.Name == name {
					delete(missing, name)
					return true
				}
			}
		case *ast.ValueSpec:
			if kind, ok := spec.Type.(*ast.Ident); ok && declaration.Tok == token.CONST {
				for _, name := range wanted {
					if kind.Name == name {
						return true
					}
				}
			}
		}
	}
	return false
}
