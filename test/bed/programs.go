package bed

import (
	"os"
	"path/filepath"
)

// WriteProgramsImage makes an image of static programs alone, as deploy/Dockerfile
// does where base images can be had: in /usr/local/bin, the first of them by
// default. It returns the image's OCI layout, in a new directory dir.
func WriteProgramsImage(dir string, programs ...string) (layout string, err error) {
	var members []member
	for _, p := range programs {
		content, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		members = append(members, member{"usr/local/bin/" + filepath.Base(p), content, ""})
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "programs.tar")
	if err := writeMembers(name, members); err != nil {
		return "", err
	}
	layout = filepath.Join(dir, "layout")
	return layout, WriteLayout(layout, []string{"/usr/local/bin/" + filepath.Base(programs[0])}, []string{name})
}
