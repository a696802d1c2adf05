package mountapi

import (
	"encoding/json"
	"testing"

	"sluice/oci"
)

func FuzzParseMount(f *testing.F) {
	d := oci.DigestOf(nil)
	for _, m := range []Mount{
		{Format: FormatVHD, SMB: &SMB{Server: "host"}, Layers: []Layer{{Digest: d, DiffID: d, VHDDigest: d, Size: 1, Path: "x"}}},
		{Format: FormatBlob, Layers: []Layer{{Digest: d, DiffID: d, Size: 1}}},
		{Format: FormatVHD, Layers: []Layer{{Digest: d}}},
		{},
	} {
		doc, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		m, err := parseMount(doc)
		if err != nil {
			return
		}
		if m.Format == FormatVHD && m.SMB == nil || len(m.Layers) == 0 {
			t.Errorf("%+v", m)
		}
		for _, l := range m.Layers {
			if _, err := oci.ParseDigest(l.Digest.String()); err != nil || l.Size <= 0 {
				t.Errorf("%+v", l)
			}
		}
	})
}
