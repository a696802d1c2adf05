// Package boot measures what boot packs are worth: images made of real
// packages are converted, streamed cold and started, and every read that the
// kernel asked for up to readiness is held against what the boot pack brought.
//
// images.go and recipes.go make the images, recorder_test.go sees the reads,
// boot_test.go measures. Needs root, FUSE, and once Debian's archive.
package boot
