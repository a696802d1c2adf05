package oci_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"sluice/oci"
)

func TestErrorIs(t *testing.T) {
	err := fmt.Errorf("reading: %w", oci.ErrBlobUnknown.Withf("blob %d", 1))
	if !errors.Is(err, oci.ErrBlobUnknown) || errors.Is(err, oci.ErrManifestUnknown) {
		t.Errorf("%v is compared by something else than its code", err)
	}
	if got := err.Error(); got != "reading: blob 1" {
		t.Errorf("Error = %q", got)
	}
	if oci.ErrBlobUnknown.Message != "blob unknown to registry" {
		t.Error("Withf changed what it was called on")
	}

	wire, e := json.Marshal(oci.ErrNameUnknown)
	if e != nil {
		t.Fatal(e)
	}
	var back oci.Error
	if e := json.Unmarshal(wire, &back); e != nil || !errors.Is(&back, oci.ErrNameUnknown) {
		t.Errorf("over the wire as %s it is %+v (%v)", wire, back, e)
	}
	if got := (&oci.Error{Code: "X"}).Error(); got != "X" {
		t.Errorf("Error without a message = %q", got)
	}
}
