package bed

import (
	"os"
	"path/filepath"
	"strings"
)

// CommandLine returns the arguments of the process with that number, with a NUL
// after each, if it is one of the programs that nodes are made of; otherwise
// nothing. The others aren't even asked: to see a process's arguments one waits
// for its memory, and one that hangs in a file system doesn't let go of that.
func CommandLine(pid string) string {
	exe, err := os.Readlink(filepath.Join("/proc", pid, "exe"))
	if err != nil {
		return "" // it has ended, or is the kernel's
	}
	switch base := strings.TrimSuffix(filepath.Base(exe), " (deleted)"); {
	case strings.HasPrefix(base, "sluice"), strings.HasPrefix(base, "containerd"), base == "runc", base == "ctr", base == "dockerd":
		line, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline")) // it may have ended meanwhile
		return string(line)
	}
	return ""
}
