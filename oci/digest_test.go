package oci_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"sluice/oci"
)

func TestParseDigest(t *testing.T) {
	for _, good := range []string{
		someDigest,
		"sha512:" + strings.Repeat("0a", 64),
	} {
		if d, err := oci.ParseDigest(good); err != nil || d.String() != good {
			t.Errorf("ParseDigest(%q) = %q, %v", good, d, err)
		}
	}
	for _, bad := range []string{
		"", ":", "sha256", "sha256:", "sha256:0", someDigest + "0", someDigest[:len(someDigest)-1], strings.ToUpper(someDigest), " " + someDigest, someDigest + "\n",
		"sha512:" + someDigest[7:], "sha384:" + strings.Repeat("0", 96), "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256+x:" + someDigest[7:],
	} {
		if d, err := oci.ParseDigest(bad); !errors.Is(err, oci.ErrDigestInvalid) || d != "" {
			t.Errorf("ParseDigest(%q) = %q, %v; want ErrDigestInvalid", bad, d, err)
		}
	}
}

func FuzzParseDigest(f *testing.F) {
	for _, s := range []string{someDigest, "sha512:" + strings.Repeat("0", 128), "md5:00", "sha256:", "a:b:c", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := oci.ParseDigest(s)
		known := strings.HasPrefix(s, "sha256:") || strings.HasPrefix(s, "sha512:")
		if want := known && oci.Digest(s).Validate() == nil; (err == nil) != want {
			t.Fatalf("%q: %v, want it accepted: %v", s, err, want)
		}
		if err != nil {
			if !errors.Is(err, oci.ErrDigestInvalid) {
				t.Errorf("%q: %v is not ErrDigestInvalid", s, err)
			}
			return
		}
		// What has been parsed can be verified with, and be a path's element.
		d.Verifier()
		if d.String() != s || strings.ContainsAny(d.Encoded(), "/.\\") || len(d.Encoded()) != 2*d.Algorithm().Size() {
			t.Errorf("%q is accepted as a digest", s)
		}
	})
}

func TestDigestOf(t *testing.T) {
	if got := oci.DigestOf([]byte("hello")); got != someDigest {
		t.Errorf("DigestOf = %s, want %s", got, someDigest)
	}
}

func TestVerifyReader(t *testing.T) {
	content := []byte("hello")
	desc := oci.Descriptor{Digest: someDigest, Size: 5}
	readers := map[string]func(io.Reader) io.Reader{
		"plain":    func(r io.Reader) io.Reader { return r },
		"bytewise": iotest.OneByteReader,
		"data+EOF": iotest.DataErrReader,
		"half":     iotest.HalfReader,
	}
	for name, wrap := range readers {
		if got, err := io.ReadAll(oci.VerifyReader(wrap(bytes.NewReader(content)), desc)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if err := iotest.TestReader(oci.VerifyReader(wrap(bytes.NewReader(content)), desc), content); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for what, test := range map[string]struct {
			content string
			desc    oci.Descriptor
			want    error
		}{
			"short":     {"hell", desc, oci.ErrSizeInvalid},
			"none":      {"", desc, oci.ErrSizeInvalid},
			"long":      {"hello!", desc, oci.ErrSizeInvalid},
			"other":     {"hallo", desc, oci.ErrDigestInvalid},
			"no size":   {"hello", oci.Descriptor{Digest: someDigest}, oci.ErrSizeInvalid},
			"negative":  {"hello", oci.Descriptor{Digest: someDigest, Size: -1}, oci.ErrSizeInvalid},
			"no digest": {"hello", oci.Descriptor{Size: 5}, oci.ErrDigestInvalid},
			"bad":       {"hello", oci.Descriptor{Digest: "x:y", Size: 5}, oci.ErrDigestInvalid},
		} {
			r := oci.VerifyReader(wrap(strings.NewReader(test.content)), test.desc)
			got, err := io.ReadAll(r)
			if !errors.Is(err, test.want) {
				t.Errorf("%s, %s: got error %v, want %v", name, what, err, test.want)
			}
			if int64(len(got)) >= max(test.desc.Size, 1) {
				t.Errorf("%s, %s: all %d bytes were handed out before they were verified", name, what, len(got))
			}
			if _, again := r.Read(make([]byte, 1)); !errors.Is(again, test.want) {
				t.Errorf("%s, %s: the error doesn't stay: %v", name, what, again)
			}
		}
	}
	// An exact read, which never asks for the end, can't miss a mismatch.
	if _, err := io.ReadFull(oci.VerifyReader(strings.NewReader("hallo"), desc), make([]byte, 5)); !errors.Is(err, oci.ErrDigestInvalid) {
		t.Errorf("exact read: got error %v, want ErrDigestInvalid", err)
	}
}

func TestVerifyReaderSource(t *testing.T) {
	desc := oci.Descriptor{Digest: someDigest, Size: 5}
	broken := errors.New("broken")
	for _, content := range []string{"", "he", "hello"} {
		r := oci.VerifyReader(io.MultiReader(strings.NewReader(content), iotest.ErrReader(broken)), desc)
		if _, err := io.ReadAll(r); !errors.Is(err, broken) {
			t.Errorf("source that breaks after %q: got error %v", content, err)
		}
	}
	stuck := io.MultiReader(strings.NewReader("hello"), stuckReader{})
	if _, err := io.ReadAll(oci.VerifyReader(stuck, desc)); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("source that neither ends nor yields: got error %v", err)
	}
}

type stuckReader struct{}

func (stuckReader) Read([]byte) (int, error) { return 0, nil }
