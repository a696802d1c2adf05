package storage

import "time"

// SetLimits makes things small enough for tests: the first parts, objects
// without a pointer; and sets the clock.
func (o *Objects) SetLimits(partSize, inline int, now func() time.Time) {
	o.partSize, o.inline, o.now = partSize, inline, now
}

// PartSizeOf is partSizeOf.
func (o *Objects) PartSizeOf(n int) int { return o.partSizeOf(n) }

// ParseRecord and ParsePointer are for fuzzing.
func ParseRecord(name string, encoded []byte) error {
	_, err := parseRecord(name, encoded)
	return err
}

func ParsePointer(label string) error {
	_, _, err := parsePointer("key", label)
	return err
}
