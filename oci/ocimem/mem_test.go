package ocimem_test

import (
	"testing"

	"sluice/oci"
	"sluice/oci/ocimem"
	"sluice/oci/ocitest"
)

func TestContract(t *testing.T) {
	ocitest.Run(t, func(*testing.T) oci.Registry { return ocimem.New() })
}
