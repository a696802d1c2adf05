package planetest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mapVariable makes the test binary a process that maps files of the directory it
// names.
const mapVariable = "SLUICE_PLANETEST_MAP"

// exitFault is its exit code when the kernel could not supply a page.
const exitFault = 9

var errFault = errors.New("a page of the mapping could not be read")

// Child turns the process into the suite's child if it is to be one, and
// returns otherwise. It is for the beginning of TestMain.
func Child() {
	dir := os.Getenv(mapVariable)
	if dir == "" {
		return
	}
	names := bufio.NewScanner(os.Stdin)
	for names.Scan() {
		err := copyMapping(filepath.Join(dir, names.Text()))
		switch {
		case errors.Is(err, unix.EFAULT):
			os.Exit(exitFault)
		case err != nil:
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(0)
}

// copyMapping writes the mapped pages of a file, each to its end, to the
// standard output. The page faults happen in write(2), which turns failed ones
// into EFAULT instead of a signal.
func copyMapping(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	page := os.Getpagesize()
	size := (int(info.Size()) + page - 1) / page * page
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	defer unix.Munmap(m)
	for len(m) > 0 {
		n, err := unix.Write(1, m)
		if err != nil {
			return fmt.Errorf("pages of %s from %d on: %w", name, size-len(m), err)
		}
		m = m[n:]
	}
	return nil
}

// mapped reads files through memory mappings in another process, each to the end
// of its last page, one behind the other.
func mapped(t *testing.T, dir string, files ...File) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), mapVariable+"="+dir)
	var names, out, messages bytes.Buffer
	for _, f := range files {
		fmt.Fprintln(&names, f.Name)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &names, &out, &messages
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == exitFault {
		return nil, errFault
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, messages.Bytes())
	}
	return out.Bytes(), nil
}
