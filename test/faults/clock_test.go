package faults

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// authority is a certificate authority that the nodes of a test trust.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// newAuthority makes one and has the processes that the test starts trust it,
// and nobody else.
func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "faults"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Unix(0, 0), NotAfter: time.Now().AddDate(100, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", file)
	return &authority{key, cert}
}

// certificate is one for ip.
func (a *authority) certificate(t *testing.T, ip string, from, to time.Time) *tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, IPAddresses: []net.IP{net.ParseIP(ip)}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.key}
}

// overTLS gives a node that was prepared a proxy with TLS.
func (s *stage) overTLS(t *testing.T, n *node, certificate func() *tls.Certificate) {
	t.Helper()
	p, err := NewTLSProxy(t.Context(), tlsAddress, s.Registry.Addr, s.allKinds(), certificate)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	n.proxy.Close()
	n.proxy = p
}

// tlsAddress is on loopback, and probably nobody else's.
const (
	tlsIP      = "127.83.17.5"
	tlsAddress = tlsIP + ":443"
)

// TestCertificateOutOfTime is what a node sees whose clock is wrong, or whose
// registry's certificate is: not valid yet, not valid any more. The reason is
// visible, and it heals with the certificate, or the clock.
func TestCertificateOutOfTime(t *testing.T) {
	s := theStage(t)
	ca := newAuthority(t)
	now := time.Now()
	good := ca.certificate(t, tlsIP, now.Add(-time.Hour), now.Add(time.Hour))
	for name, bad := range map[string]*tls.Certificate{
		"not-yet-valid": ca.certificate(t, tlsIP, now.Add(time.Hour), now.Add(2*time.Hour)),
		"expired":       ca.certificate(t, tlsIP, now.Add(-2*time.Hour), now.Add(-time.Hour)),
		"other-name":    ca.certificate(t, "127.0.0.9", now.Add(-time.Hour), now.Add(time.Hour)),
	} {
		t.Run(name, func(t *testing.T) {
			n := s.prepare(t, "--no-fill")
			var shown atomic.Pointer[tls.Certificate]
			shown.Store(bad)
			s.overTLS(t, n, shown.Load)
			if err := n.StartSluice(t.Context()); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(n.Dir, "mnt")
			err := n.mount(t, s.app, dir)
			var r *refusal
			if !errors.As(err, &r) || r.Reason != "RegistryUnavailable" || !strings.Contains(r.Message, "certificate") {
				t.Errorf("mounting: %v, want RegistryUnavailable because of the certificate", err)
			}
			shown.Store(good)
			eventually(t, mountBound, "mounting with a good certificate", func() error { return n.mount(t, s.app, dir) })
			// Connections that are open stay good; new ones would not be.
			shown.Store(bad)
			wrong, failed, slowest := s.app.files.readAll(dir, readBound)
			checkReads(t, wrong, failed, slowest)
			shown.Store(good)
			eventually(t, slack, "reading with a good certificate", func() error {
				wrong, failed, _ := s.app.files.readAll(dir, readBound)
				if len(wrong)+len(failed) > 0 {
					return errors.New("reads fail")
				}
				return nil
			})
		})
	}
}

// steppable builds a sluice whose wall clock is off by as many seconds as the
// file says that SLUICE_TEST_CLOCK names: the real program with another
// time.Now. The machine's own clock belongs to others, too, and time namespaces
// don't have this one.
func (s *stage) steppable(t *testing.T) string {
	t.Helper()
	root, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	std := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	source, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const call = "sec, nsec, mono := runtimeNow()\n"
	if bytes.Count(source, []byte(call)) < 1 {
		t.Skip("this Go's time.Now is another")
	}
	source = bytes.ReplaceAll(source, []byte(call), []byte(call+"\tsec += clockStep()\n"))
	const step = `package time

import (
	"sync/atomic"
	"syscall"
)

var clockSeconds atomic.Int64

// clockStep returns by how many seconds the clock was stepped. The scheduler
// asks, too: nothing may be called here.
func clockStep() int64 { return clockSeconds.Load() }

func init() {
	name, ok := syscall.Getenv("SLUICE_TEST_CLOCK")
	if !ok {
		return
	}
	readClockStep(name)
	go func() {
		for {
			Sleep(5 * Millisecond)
			readClockStep(name)
		}
	}()
}

func readClockStep(name string) {
	fd, err := open(name)
	if err != nil {
		return
	}
	defer closefd(fd)
	var buf [32]byte
	n, err := read(fd, buf[:])
	if err != nil || n == 0 {
		return
	}
	sign, value := int64(1), int64(0)
	for _, c := range buf[:n] {
		if c == '-' {
			sign = -1
		} else if c >= '0' && c <= '9' {
			value = value*10 + int64(c-'0')
		}
	}
	clockSeconds.Store(sign * value)
}
`
	return s.overlaid(t, "sluice-clock", map[string][]byte{
		filepath.Join(std, "time.go"): source, filepath.Join(std, "clockstep.go"): []byte(step),
	})
}

// TestClockJumps steps the wall clock of a node that is at work, by an hour, to
// years ago and to years ahead, and starts it again with it: TLS says that
// certificates are out of time, and all is well when the clock is.
func TestClockJumps(t *testing.T) {
	if !everything() {
		t.Skip("building a sluice with another clock compiles all of it anew: SLUICE_FAULTS=all")
	}
	s := theStage(t)
	bin := s.steppable(t)
	ca := newAuthority(t)
	now := time.Now()
	good := ca.certificate(t, tlsIP, now.Add(-24*time.Hour), now.Add(24*time.Hour))
	clock := filepath.Join(t.TempDir(), "clock")
	set := func(d time.Duration) {
		t.Helper()
		if err := os.WriteFile(clock, []byte(strconv.Itoa(int(d.Seconds()))), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Setenv("SLUICE_TEST_CLOCK", clock)
	set(0)
	s2 := s.with(bin)
	const year = 365 * 24 * time.Hour
	for _, jump := range []time.Duration{time.Hour, -time.Hour, 10 * year, -30 * year} {
		t.Run(jump.String(), func(t *testing.T) {
			n := s2.prepare(t, "--no-fill")
			s.overTLS(t, n, func() *tls.Certificate { return good })
			set(0)
			if err := n.StartSluice(t.Context()); err != nil {
				t.Fatal(err)
			}
			dir, other := filepath.Join(n.Dir, "mnt"), filepath.Join(n.Dir, "other")
			if err := n.mount(t, s.app, dir); err != nil {
				t.Fatal(err)
			}
			check := func(when string, all bool) {
				t.Helper()
				wrong, failed, slowest := s.app.files.readAll(dir, readBound)
				checkReads(t, wrong, failed, slowest)
				if all && len(failed) > 0 {
					t.Errorf("%s: %d reads fail, the first: %v", when, len(failed), failed[0])
				}
			}
			set(jump)
			small := max(jump, -jump) < 24*time.Hour
			check("after the jump", small)
			// A connection that is open still is good.
			if err := n.mount(t, s.other, other); err != nil && (small || !strings.Contains(err.Error(), "certificate")) {
				t.Errorf("mounting after the jump: %v", err)
			}
			n.Sluice.Kill()
			if err := n.StartSluice(t.Context()); err != nil {
				t.Fatalf("starting with the clock off: %v", err)
			}
			check("after a restart with the clock off", small)
			set(0)
			eventually(t, mountBound, "mounting when the clock is right again", func() error { return n.mount(t, s.other, filepath.Join(n.Dir, "third")) })
			time.Sleep(readTimeout / 4)
			check("when the clock is right again", true)
			if got := n.status(t); len(got.Images) != 2 {
				t.Errorf("%d images, want 2", len(got.Images))
			}
		})
	}
}
