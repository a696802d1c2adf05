package run

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// maxUserFile bounds what is read of an image's /etc/passwd and /etc/group.
const maxUserFile = 4 << 20

// findUser resolves the User of an image's config: "", "user", "uid",
// "user:group" with names or numbers on either side (image-spec, config.md).
// Names are looked up in the image. Without a group the user's own one is
// taken, and those whose member it is.
func findUser(rootfs, spec string) (specs.User, error) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return specs.User{}, err
	}
	defer root.Close()
	name, group, hasGroup := strings.Cut(spec, ":")
	user, login, err := lookupUser(root, name)
	if err != nil {
		return specs.User{}, err
	}
	groups, err := readTable(root, "etc/group")
	if err != nil {
		return specs.User{}, err
	}
	if hasGroup && group != "" {
		user.GID, err = lookupGroup(groups, group)
		return user, err
	}
	for _, g := range groups { // name:password:gid:member,member
		if len(g) < 4 || login == "" || !slices.Contains(strings.Split(g[3], ","), login) {
			continue
		}
		if gid, err := parseID(g[2]); err == nil && gid != user.GID {
			user.AdditionalGids = append(user.AdditionalGids, gid)
		}
	}
	return user, nil
}

// lookupUser finds a user by name or number. Numbers needn't be in the table.
func lookupUser(root *os.Root, name string) (specs.User, string, error) {
	if name == "" {
		name = "0"
	}
	users, err := readTable(root, "etc/passwd")
	if err != nil {
		return specs.User{}, "", err
	}
	number, nerr := parseID(name)
	for _, u := range users { // name:password:uid:gid:…
		if len(u) < 4 {
			continue
		}
		uid, err := parseID(u[2])
		gid, gerr := parseID(u[3])
		if err != nil || gerr != nil {
			continue
		}
		if u[0] == name || nerr == nil && uid == number {
			return specs.User{UID: uid, GID: gid}, u[0], nil
		}
	}
	if nerr != nil {
		return specs.User{}, "", fmt.Errorf("the image's user %q isn't in its /etc/passwd", name)
	}
	return specs.User{UID: number}, "", nil
}

func lookupGroup(groups [][]string, name string) (uint32, error) {
	number, nerr := parseID(name)
	for _, g := range groups {
		if len(g) >= 3 && g[0] == name {
			return parseID(g[2])
		}
	}
	if nerr != nil {
		return 0, fmt.Errorf("the image's group %q isn't in its /etc/group", name)
	}
	return number, nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err
}

// readTable reads a file of the image whose lines are fields with colons
// between. An image needn't have it. Links are followed, but not out of the
// image.
func readTable(root *os.Root, name string) ([][]string, error) {
	fi, err := root.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the image's /%s: %w", name, err)
	}
	// Before it's opened: that waits for ever if it is a FIFO, and can do
	// anything to this machine if it is a device node.
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("the image's /%s isn't a file", name)
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, fmt.Errorf("the image's /%s: %w", name, err)
	}
	defer f.Close()
	var table [][]string
	lines := bufio.NewScanner(io.LimitReader(f, maxUserFile))
	lines.Buffer(nil, maxUserFile)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && line[0] != '#' {
			table = append(table, strings.Split(line, ":"))
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("the image's /%s: %w", name, err)
	}
	return table, nil
}
