package bed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// formerCommit is the version of Sluice before the present one.
const formerCommit = "0971dd8c"

// Former returns the path of the former version of sluice, whose state and
// processes the present one has to take over. It is built from the history of
// the checkout src unless it is cached.
func Former(ctx context.Context, src string, say func(string)) (string, error) {
	dir, err := cached("sluice/"+formerCommit, func(tmp string) error {
		say("building the former version of sluice (once; a minute)")
		tree := filepath.Join(tmp, "src")
		if err := os.Mkdir(tree, 0o755); err != nil {
			return err
		}
		archive := filepath.Join(tmp, "src.tar")
		cmd := exec.CommandContext(ctx, "git", "archive", "--output", archive, formerCommit)
		cmd.Dir = src
		if err := run(cmd); err != nil {
			return fmt.Errorf("commit %s isn't in the history of %s: %w", formerCommit, src, err)
		}
		if err := run(exec.CommandContext(ctx, "tar", "-C", tree, "-xf", archive)); err != nil {
			return err
		}
		if _, err := buildSluice(ctx, tree, tmp); err != nil {
			return err
		}
		return errors.Join(os.RemoveAll(tree), os.Remove(archive))
	})
	return filepath.Join(dir, "sluice"), err
}
