package mount

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ProcessStart returns when a process started, in clock ticks since boot,
// which together with its ID names a process for as long as the machine is up
// (proc_pid_stat(5), field 22).
func ProcessStart(pid int) (uint64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, which may have
	// spaces and parentheses itself.
	_, rest, ok := cutLast(string(content), ") ")
	fields := strings.Fields(rest)
	const start = 22 - 3 // rest begins with field 3
	if !ok || len(fields) <= start {
		return 0, fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	return strconv.ParseUint(fields[start], 10, 64)
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
