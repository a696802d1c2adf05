// Package whole tests Sluice as people use it: the real programs, a real
// registry with a real image, containerd, runc, a shaped link between them.
// Its tests need root and a few gigabytes below the temporary directory.
package whole
