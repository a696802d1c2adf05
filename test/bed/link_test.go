package bed

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLinkShapes(t *testing.T) {
	body := bytes.Repeat([]byte("sluice"), 500_000) // 3 MB
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/big" {
			_, _ = w.Write(body)
		}
	}))
	defer srv.Close()
	link, err := NewLink(t.Context(), srv.Listener.Addr().String(), 80e6, 40*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(path string) ([]byte, time.Duration) {
		start := time.Now()
		resp, err := client.Get("http://" + link.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return b, time.Since(start)
	}
	if _, d := get("/"); d < 80*time.Millisecond {
		t.Errorf("first request took %v: a handshake and a round trip of 40 ms each are due", d)
	}
	if _, d := get("/"); d < 40*time.Millisecond {
		t.Errorf("second request took %v, less than the round trip", d)
	}
	got, d := get("/big")
	if !bytes.Equal(got, body) {
		t.Error("content changed on the way")
	}
	if d < 300*time.Millisecond {
		t.Errorf("3 MB took %v at 10 MB/s", d)
	}
	if s := link.Stats(); s.Down < int64(len(body)) || s.Connections != 1 {
		t.Errorf("stats %+v", s)
	}
}

// Servers behind a link share its bandwidth.
func TestLinkIsShared(t *testing.T) {
	body := bytes.Repeat([]byte("sluice"), 250_000) // 1.5 MB
	var addrs []string
	for range 2 {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }))
		defer srv.Close()
		addrs = append(addrs, srv.Listener.Addr().String())
	}
	link, err := NewLink(t.Context(), addrs[0], 80e6, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	other, err := link.Add(t.Context(), addrs[1])
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	start := time.Now()
	var wg sync.WaitGroup
	for _, addr := range []string{link.Addr(), other} {
		wg.Go(func() {
			resp, err := client.Get("http://" + addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	if d := time.Since(start); d < 280*time.Millisecond { // less what may be queued
		t.Errorf("3 MB from two servers took %v at 10 MB/s", d)
	}
	if s := link.Stats(); s.Down < 2*int64(len(body)) || s.Connections != 2 {
		t.Errorf("stats %+v", s)
	}
}

func TestLinkCloseCutsConnections(t *testing.T) {
	hold := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hold }))
	defer srv.Close()
	defer close(hold)
	link, err := NewLink(t.Context(), srv.Listener.Addr().String(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", link.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.Copy(c, strings.NewReader("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	link.Close()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the connection outlived the link: %v", err)
	}
}
