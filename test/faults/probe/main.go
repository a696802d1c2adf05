// Command probe is the only program in the image of the fault tests. It prints
// its name, so that one that finds nothing isn't silent, and the SHA-256 of every file beneath a directory, or the error of reading it;
// with a second argument it appends that to /mine first, and with a third it
// then waits until it is killed.
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 2 {
		f, err := os.OpenFile("/mine", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err == nil {
			_, err = fmt.Fprintln(f, os.Args[2])
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	fmt.Println("probe")
	_ = filepath.WalkDir(os.Args[1], func(name string, d fs.DirEntry, err error) error {
		var b []byte
		if err == nil && d.Type().IsRegular() {
			b, err = os.ReadFile(name)
		}
		var errno syscall.Errno
		switch {
		case errors.As(err, &errno):
			fmt.Println(name, errno.Error())
		case err == nil && d.Type().IsRegular():
			fmt.Printf("%s %x\n", name, sha256.Sum256(b))
		}
		return nil
	})
	if len(os.Args) > 3 {
		time.Sleep(time.Hour)
	}
}
