// Command hostinit is the first process of a host of the bed (bed.Host): it
// waits for children whose parents have ended, as every PID 1 must, and does
// nothing else. When it is killed, the kernel ends all that runs on the host.
package main

import (
	"errors"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	for range ended {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || pid == 0 {
				break // nobody is left to wait for: the next signal tells
			}
		}
	}
}
