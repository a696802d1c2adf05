package faults

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice/test/bed"
)

// complete waits until all content of an image is on the node.
func (n *node) complete(t *testing.T, img *image) {
	t.Helper()
	eventually(t, 2*slack, "the rest of the image", func() error {
		for _, i := range n.status(t).Images {
			if i.Reference == n.ref(img) && i.Complete {
				return nil
			}
		}
		return errors.New("it isn't complete")
	})
}

// TestRegistryGone takes the registry away for good, right after the pull: reads
// of what isn't there fail within the bound, everything else goes on, also over
// a restart, and the image can be removed.
func TestRegistryGone(t *testing.T) {
	s := theStage(t)
	t.Parallel()
	n := s.withContainerd(t)
	for _, img := range []*image{s.app, s.other} {
		if err := n.pull(t, img); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(n.Dir, "mnt")
	if err := n.mount(t, s.app, dir); err != nil {
		t.Fatal(err)
	}
	if err := n.run(t, s.other); err != nil { // so that its content is here
		t.Fatal(err)
	}
	addr := n.proxy.Addr()
	n.proxy.Close()
	check := func(when string) {
		t.Helper()
		began := time.Now()
		wrong, failed, slowest := s.app.files.readAll(dir, readBound)
		checkReads(t, wrong, failed, slowest)
		t.Logf("%s: %d pieces failed, the slowest after %v, all after %v", when, len(failed), slowest, time.Since(began))
		if err := n.run(t, s.other); err != nil {
			t.Errorf("%s: a container whose content is here: %v", when, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "data/a/big")); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("registry gone")
	n.Sluice.Kill()
	began := time.Now()
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatalf("starting without the registry: %v", err)
	}
	if took := time.Since(began); took > slack {
		t.Errorf("starting without the registry took %v", took)
	}
	if err := n.AwaitConnection(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("registry gone, daemon restarted")
	if err := n.pull(t, s.plain); err == nil || errors.Is(err, errHangs) {
		t.Errorf("pulling from a registry that is gone: %v", err)
	}
	if err := n.umount(t, dir); err != nil {
		t.Error(err)
	}
	for _, img := range []*image{s.app, s.other} {
		if _, err := n.Ctr(t.Context(), "images", "rm", "--sync", addr+"/"+img.name); err != nil {
			t.Errorf("removing an image whose registry is gone: %v", err)
		}
	}
	n.checkEmpty(t)
}

// TestPowerLost ends everything at once, with containers running, and starts
// again without the registry: images are mounted again, containers find what
// they had written, also those of ordinary images.
func TestPowerLost(t *testing.T) {
	s := theStage(t)
	t.Parallel()
	n := s.withContainerd(t)
	for i, img := range []*image{s.app, s.plain} {
		if err := n.pull(t, img); err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("keeps-%d", i)
		// By default runc's state lies outside of the node's directory.
		runc := filepath.Join(n.Dir, "state", "runc")
		if _, err := n.Ctr(t.Context(), "run", "--runc-root", runc, "--detach", "--net-host", "--snapshotter", bed.Sluice, n.ref(img), id, probe, "/data", "before", "stay"); err != nil {
			t.Fatal(err)
		}
	}
	n.complete(t, s.app)
	n.proxy.Close()
	if err := n.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatalf("starting after power was lost: %v", err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, img := range []*image{s.app, s.plain} {
		if err := n.run(t, img); err != nil {
			t.Errorf("a new container after power was lost: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), runBound)
		defer cancel()
		id := fmt.Sprintf("keeps-%d", i)
		if _, err := n.Ctr(ctx, "tasks", "start", "--detach", id); err != nil {
			t.Errorf("the container of before: %v", err)
			continue
		}
		eventually(t, slack, "what the container wrote", func() error {
			mine, err := n.written(id)
			if err == nil && mine != "before\nbefore\n" {
				err = fmt.Errorf("it has %q", mine)
			}
			return err
		})
	}
}

// written returns what the probe of a container appended to /mine, from the
// snapshots' directories: one snapshot has it.
func (n *node) written(id string) (string, error) {
	names, err := filepath.Glob(filepath.Join(n.Dir, "state", "io.containerd.runtime.v2.task", "default", id, "rootfs", "mine"))
	if err != nil || len(names) != 1 {
		return "", fmt.Errorf("%d files, %w", len(names), err)
	}
	b, err := os.ReadFile(names[0])
	return string(b), err
}

// TestOneBrokenImage damages what the node keeps of one image, in each file in
// turn: the daemon starts all the same, the other image is as it was, and
// pulling the broken one again mends it.
func TestOneBrokenImage(t *testing.T) {
	s := theStage(t)
	harms := map[string]func(name string) error{
		"empty": func(name string) error { return os.Truncate(name, 0) },
		"half": func(name string) error {
			fi, err := os.Stat(name)
			return errors.Join(err, os.Truncate(name, fi.Size()/2))
		},
		"missing": os.Remove,
		"zeros": func(name string) error {
			fi, err := os.Stat(name)
			if err != nil {
				return err
			}
			return os.WriteFile(name, make([]byte, fi.Size()), 0o600)
		},
	}
	for harm, do := range harms {
		t.Run(harm, func(t *testing.T) {
			t.Parallel()
			n := s.node(t)
			dirs := map[*image]string{s.app: filepath.Join(n.Dir, "app"), s.other: filepath.Join(n.Dir, "other")}
			for img, dir := range dirs {
				if err := n.mount(t, img, dir); err != nil {
					t.Fatal(err)
				}
				if wrong, failed, _ := img.files.readAll(dir, readBound); len(wrong)+len(failed) > 0 {
					t.Fatal(wrong, failed)
				}
			}
			files := n.stateOf(t, s.app)
			if len(files) < 4 {
				t.Fatalf("the image's state is %q", files)
			}
			for _, file := range files {
				n.brokenFile(t, s, dirs, file, do)
			}
		})
	}
}

// brokenFile is TestOneBrokenImage for one file.
func (n *node) brokenFile(t *testing.T, s *stage, dirs map[*image]string, file string, harm func(string) error) {
	t.Helper()
	name := filepath.Base(file)
	n.Sluice.Stop()
	if err := bed.UnmountAll(n.Dir); err != nil { // as a reboot does, or the file isn't looked at
		t.Fatal(err)
	}
	if err := harm(file); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSluice(t.Context()); err != nil {
		t.Fatalf("%s: the daemon doesn't start: %v", name, err)
	}
	wrong, failed, _ := s.other.files.readAll(dirs[s.other], readBound)
	if len(wrong)+len(failed) > 0 {
		t.Errorf("%s: the other image suffers: %v %v", name, wrong, failed)
	}
	if wrong, _, _ := s.app.files.readAll(dirs[s.app], readBound); len(wrong) > 0 {
		t.Errorf("%s: WRONG BYTES in %s", name, wrong[0].name)
	}
	// People mount it again.
	eventually(t, slack, name+": unmounting, unless it wasn't mounted", func() error {
		err := n.umount(t, dirs[s.app])
		if err != nil && strings.Contains(err.Error(), "not mounted by this daemon") {
			return nil
		}
		return err // a process that another test starts may have its files for a moment
	})
	if err := n.mount(t, s.app, dirs[s.app]); err != nil {
		t.Errorf("%s: mounting again: %v", name, err)
		return
	}
	if wrong, failed, _ := s.app.files.readAll(dirs[s.app], readBound); len(wrong)+len(failed) > 0 {
		t.Errorf("%s: after mounting again: %v %v", name, wrong, failed)
	}
}

// stateOf lists the files that a node keeps of an image.
func (n *node) stateOf(t *testing.T, img *image) []string {
	t.Helper()
	var all []string
	root := filepath.Join(n.Dir, "sluice", "images")
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(root, e.Name(), "image.json"))
		if err != nil || !strings.Contains(string(b), strings.Split(img.name, ":")[0]) {
			continue
		}
		err = filepath.WalkDir(filepath.Join(root, e.Name()), func(name string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				all = append(all, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// TestManyMounts mounts and unmounts an image many times at once: not one in a
// thousand fails, and nothing is left.
func TestManyMounts(t *testing.T) {
	s := theStage(t)
	n := s.node(t)
	if err := n.mount(t, s.app, filepath.Join(n.Dir, "first")); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t, n)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			dir := filepath.Join(n.Dir, fmt.Sprintf("mnt-%d", i))
			for range 125 {
				if err := n.mount(t, s.app, dir); err != nil {
					t.Errorf("mount: %v", err)
					return
				}
				if err := readPiece(filepath.Join(dir, "/data/a/page"), s.app.files["/data/a/page"], 0); err != nil {
					t.Errorf("read: %v", err)
				}
				// A process of another test may have the file for a moment.
				err := n.umount(t, dir)
				for range 50 {
					if err == nil || !strings.Contains(err.Error(), "in use") {
						break
					}
					time.Sleep(10 * time.Millisecond)
					err = n.umount(t, dir)
				}
				if err != nil {
					t.Errorf("umount: %v", err)
					return
				}
			}
		})
	}
	all.Wait()
	eventually(t, slack, "descriptors that are closed again", func() error {
		if after := descriptors(t, n); after > before+8 {
			return fmt.Errorf("%d, before they were %d", after, before)
		}
		return nil
	})
	if m, err := bed.Mounts(n.Dir); err != nil || len(m) != 3 { // the FUSE mount, the image's, and the first
		t.Errorf("mounts that are left: %q, %v", m, err)
	}
}

// descriptors counts the daemon's open files.
func descriptors(t *testing.T, n *node) int {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.Sluice.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestTokenExpires lets tokens expire while everything is being read: nobody
// notices.
func TestTokenExpires(t *testing.T) {
	s := theStage(t)
	t.Parallel()
	for at := range 8 {
		n := s.node(t, "--no-fill")
		dir := filepath.Join(n.Dir, "mnt")
		if err := n.mount(t, s.app, dir); err != nil {
			t.Fatal(err)
		}
		// Once: a request that meets two expired tokens in a row is refused.
		n.proxy.Watch(func(now int, _ Kind) {
			if now == at+1 {
				n.proxy.ExpireTokens()
			}
		})
		wrong, failed, slowest := s.app.files.readAll(dir, readBound)
		checkReads(t, wrong, failed, slowest)
		if len(failed) > 0 {
			t.Errorf("tokens that expired with request %d: %d reads failed, the first: %v", at+1, len(failed), failed[0])
		}
		n.proxy.Watch(nil)
	}
}

// TestFillIsDisturbed has the background fill fail, at layers' metadata and at
// their content: status tells, and the next daemon goes on. (The same one does
// after two and a half minutes.)
func TestFillIsDisturbed(t *testing.T) {
	s := theStage(t)
	for _, k := range []Kind{LayerMetadata, Layer} {
		for _, f := range Catalog() {
			if f.Name != "flip-bit" && f.Name != "403" && f.Name != "close-in-body" {
				continue
			}
			t.Run(string(k)+"/"+f.Name, func(t *testing.T) {
				t.Parallel()
				n := s.node(t)
				n.proxy.Arm(f, k, -1)
				dir := filepath.Join(n.Dir, "mnt")
				if err := n.mount(t, s.app, dir); err != nil {
					t.Fatal(err)
				}
				eventually(t, 2*slack, "a problem in the status", func() error {
					if i := n.status(t).Images; len(i) != 1 || i[0].Problem == "" || i[0].Complete {
						return fmt.Errorf("it has %+v", i)
					}
					return nil
				})
				if n.proxy.Disarm() == 0 {
					t.Error("nothing was tested")
				}
				n.Sluice.Kill()
				if err := n.StartSluice(t.Context()); err != nil {
					t.Fatal(err)
				}
				n.complete(t, s.app)
				n.proxy.Close() // it isn't needed any more
				if wrong, failed, _ := s.app.files.readAll(dir, readBound); len(wrong)+len(failed) > 0 {
					t.Errorf("reading what is complete: %v %v", wrong, failed)
				}
			})
		}
	}
}

// TestPlaneTakenAway unmounts the node's FUSE mount under its readers: they get
// EIO or ENOTCONN, never other bytes, and the node makes a new one.
func TestPlaneTakenAway(t *testing.T) {
	s := theStage(t)
	t.Parallel()
	n := s.node(t)
	dir := filepath.Join(n.Dir, "mnt")
	if err := n.mount(t, s.app, dir); err != nil {
		t.Fatal(err)
	}
	n.proxy.Arm(Fault{Name: "stall", Serve: func(x *Exchange) { x.Stall() }}, Layer, -1)
	time.AfterFunc(300*time.Millisecond, func() {
		_ = syscall.Unmount(filepath.Join(n.Dir, "run", "plane", "blobs"), syscall.MNT_FORCE|syscall.MNT_DETACH) // it is there
	})
	wrong, _, _ := s.app.files.readAll(dir, readBound)
	if len(wrong) > 0 {
		t.Errorf("WRONG BYTES in %s", wrong[0].name)
	}
	n.proxy.Disarm()
	again := filepath.Join(n.Dir, "again")
	eventually(t, mountBound, "mounting with a new FUSE mount", func() error {
		if err := n.mount(t, s.other, again); err != nil {
			return err
		}
		wrong, failed, _ := s.other.files.readAll(again, readBound)
		if len(wrong)+len(failed) > 0 {
			return fmt.Errorf("%v %v", wrong, failed)
		}
		return nil
	})
}

// TestLostImage loses what the node keeps of an image that containerd has, as a
// disk that was restored from an old copy does: containers start all the same,
// and nobody has to remove and pull it.
func TestLostImage(t *testing.T) {
	s := theStage(t)
	for _, lost := range []string{"manifest.json", "image.json", "merged.erofs", ""} {
		t.Run("lost "+lost, func(t *testing.T) {
			t.Parallel()
			n := s.withContainerd(t)
			if err := n.pull(t, s.app); err != nil {
				t.Fatal(err)
			}
			if err := n.run(t, s.app); err != nil {
				t.Fatal(err)
			}
			if err := n.PowerOff(t.Context()); err != nil {
				t.Fatal(err)
			}
			dirs, err := filepath.Glob(filepath.Join(n.Dir, "sluice", "images", "*"))
			if err != nil || len(dirs) != 1 {
				t.Fatal(dirs, err)
			}
			if err := os.RemoveAll(filepath.Join(dirs[0], lost)); err != nil {
				t.Fatal(err)
			}
			if err := n.StartSluice(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.StartContainerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.run(t, s.app); err != nil {
				t.Errorf("a container: %v", err)
			}
			n.heals(t, s.app)
		})
	}
}
