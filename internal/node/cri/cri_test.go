package cri

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/remote"
)

// containerd is one that has the answers of a test.
type containerd struct {
	runtimeapi.UnimplementedImageServiceServer
	runtimeapi.UnimplementedRuntimeServiceServer
	pull   func(context.Context, *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error)
	list   func(context.Context) (*runtimeapi.ListImagesResponse, error)
	events func(grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error
}

func (c *containerd) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	return c.pull(ctx, r)
}

func (c *containerd) ListImages(ctx context.Context, _ *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return c.list(ctx)
}

func (c *containerd) GetContainerEvents(_ *runtimeapi.GetEventsRequest, s grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	return c.events(s)
}

// serveAt serves until stop is called.
func (c *containerd) serveAt(t testing.TB, socket string) (stop func()) {
	t.Helper()
	s := grpc.NewServer(grpc.MaxSendMsgSize(maxMessage), grpc.MaxRecvMsgSize(maxMessage))
	runtimeapi.RegisterImageServiceServer(s, c)
	runtimeapi.RegisterRuntimeServiceServer(s, c)
	return serveOn(t, s, socket)
}

func serveOn(t testing.TB, s *grpc.Server, socket string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(stop)
	return stop
}

// passed is what was told of pulls.
type passed struct {
	mu    sync.Mutex
	pulls []string
	told  []Pull
	creds []remote.Credential
	ends  []error
}

func (p *passed) pull(pull Pull) func(error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pulls, p.told, p.creds = append(p.pulls, pull.Image), append(p.told, pull), append(p.creds, pull.Credential)
	return func(err error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.ends = append(p.ends, err)
	}
}

// serveProxy serves the proxy before a containerd's socket, and returns kubelet's
// connection to it, and what ends it.
func serveProxy(t testing.TB, socket string, p *passed, log *slog.Logger) (*grpc.ClientConn, func() error) {
	t.Helper()
	own := filepath.Join(t.TempDir(), "cri.sock")
	l, err := net.Listen("unix", own)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, Options{Socket: socket, Pull: p.pull, Log: log}) }()
	conn, err := grpc.NewClient("unix://"+own, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	end := sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := errors.Join(conn.Close(), end()); err != nil {
			t.Error(err)
		}
	})
	return conn, end
}

func pullRequest(image string, a *runtimeapi.AuthConfig) *runtimeapi.PullImageRequest {
	return &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}, Auth: a}
}

// A pull and its credential, if there's one, are known before containerd sees the
// pull, whose answer is containerd's.
func TestPull(t *testing.T) {
	socket, p, c := filepath.Join(t.TempDir(), "c.sock"), new(passed), new(containerd)
	c.pull = func(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
		p.mu.Lock()
		known := slices.Contains(p.pulls, r.Image.Image)
		p.mu.Unlock()
		if !known {
			return nil, status.Error(codes.Internal, "it wasn't known before")
		}
		if r.Auth.GetPassword() == "wrong" {
			s, err := status.New(codes.PermissionDenied, "pull refused").WithDetails(&errdetails.ErrorInfo{Reason: "SIGNATURE"})
			if err != nil {
				return nil, err
			}
			return nil, s.Err()
		}
		return &runtimeapi.PullImageResponse{ImageRef: "sha256:" + r.Image.Image}, nil
	}
	c.serveAt(t, socket)
	conn, _ := serveProxy(t, socket, p, nil)
	images := runtimeapi.NewImageServiceClient(conn)
	got, err := images.PullImage(t.Context(), pullRequest("a.io/app:1", &runtimeapi.AuthConfig{Username: "u", Password: "p"}))
	if err != nil || got.ImageRef != "sha256:a.io/app:1" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := images.PullImage(t.Context(), pullRequest("a.io/public:1", nil)); err != nil {
		t.Errorf("without a credential: %v", err)
	}
	_, err = images.PullImage(t.Context(), pullRequest("a.io/app:2", &runtimeapi.AuthConfig{Username: "u", Password: "wrong"}))
	s := status.Convert(err)
	if s.Code() != codes.PermissionDenied || s.Message() != "pull refused" || len(s.Details()) != 1 {
		t.Errorf("a refused pull: %v, %v", err, s.Details())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	want := []remote.Credential{{Username: "u", Password: "p"}, {}, {Username: "u", Password: "wrong"}}
	if !slices.Equal(p.creds, want) || len(p.ends) != 3 || p.ends[0] != nil || p.ends[1] != nil || status.Code(p.ends[2]) != codes.PermissionDenied {
		t.Errorf("told of %v, which ended with %v", p.pulls, p.ends)
	}
}

func TestCredential(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for _, c := range []struct {
		auth *runtimeapi.AuthConfig
		want remote.Credential
		ok   bool
	}{
		{nil, remote.Credential{}, true},
		{&runtimeapi.AuthConfig{}, remote.Credential{}, true},
		{&runtimeapi.AuthConfig{Username: "u", Password: "p", IdentityToken: "t"}, remote.Credential{Username: "u", Password: "p"}, true},
		{&runtimeapi.AuthConfig{IdentityToken: "t", Auth: b64("u:p")}, remote.Credential{RefreshToken: "t"}, true},
		{&runtimeapi.AuthConfig{Auth: b64("u:p:q")}, remote.Credential{Username: "u", Password: "p:q"}, true},
		{&runtimeapi.AuthConfig{Auth: b64("u")}, remote.Credential{}, false},
		{&runtimeapi.AuthConfig{Auth: "%"}, remote.Credential{}, false},
		{&runtimeapi.AuthConfig{Username: "u", ServerAddress: "https://a.io:5000"}, remote.Credential{Username: "u"}, true},
		{&runtimeapi.AuthConfig{Username: "u", ServerAddress: "a.io:5000/v2/"}, remote.Credential{Username: "u"}, true},
		{&runtimeapi.AuthConfig{Username: "u", ServerAddress: "https://a.io"}, remote.Credential{}, false},
	} {
		got, err := credential(c.auth, "a.io:5000/app:1")
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("%v: %+v, %v", c.auth, got, err)
		}
	}
	if c, err := credential(&runtimeapi.AuthConfig{Username: "u", ServerAddress: "https://index.docker.io/v1/"}, "debian"); err != nil || c.Username != "u" {
		t.Errorf("Docker Hub: %v", err)
	}
}

// What isn't known here passes byte for byte: methods of other services and of
// later versions, and fields that no version has yet.
func TestUnknownPasses(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "c.sock")
	var header metadata.MD
	serveOn(t, grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		header, _ = metadata.FromIncomingContext(s.Context())
		method, _ := grpc.MethodFromServerStream(s)
		var b []byte
		if err := s.RecvMsg(&b); err != nil {
			return err
		}
		answer := append([]byte(method+" "), b...)
		_, timed := s.Context().Deadline()
		s.SetTrailer(metadata.Pairs("timed", fmt.Sprint(timed)))
		return errors.Join(s.SetHeader(metadata.Pairs("kind", "h")), s.SendMsg(&answer))
	})), socket)
	var log bytes.Buffer
	conn, _ := serveProxy(t, socket, new(passed), slog.New(slog.NewTextHandler(&log, nil)))
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-x"), time.Minute)
	defer cancel()
	for _, method := range []string{"/runtime.v9.ImageService/Teleport", runtimeapi.ImageService_PullImage_FullMethodName} {
		request, answer := []byte("\xff\x00 s3cret, not protobuf"), []byte(nil)
		var h, tr metadata.MD
		if err := conn.Invoke(ctx, method, &request, &answer, grpc.ForceCodecV2(raw{}), grpc.Header(&h), grpc.Trailer(&tr)); err != nil {
			t.Fatal(err)
		}
		if string(answer) != method+" "+string(request) {
			t.Errorf("%s: got %q", method, answer)
		}
		if got := [3][]string{header.Get("traceparent"), h.Get("kind"), tr.Get("timed")}; fmt.Sprint(got) != "[[00-x] [h] [true]]" {
			t.Errorf("%s: metadata, header and trailer are %q", method, got)
		}
	}
	if !strings.Contains(log.String(), "can't be understood") || strings.Contains(log.String(), "s3cret") {
		t.Errorf("log: %s", &log)
	}
}

// BenchmarkCall is what forwarding adds to a call.
func BenchmarkCall(b *testing.B) {
	socket, c := filepath.Join(b.TempDir(), "c.sock"), new(containerd)
	c.list = func(context.Context) (*runtimeapi.ListImagesResponse, error) {
		return &runtimeapi.ListImagesResponse{}, nil
	}
	c.serveAt(b, socket)
	direct, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer direct.Close()
	forwarded, _ := serveProxy(b, socket, new(passed), nil)
	for name, conn := range map[string]*grpc.ClientConn{"direct": direct, "forwarded": forwarded} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := runtimeapi.NewImageServiceClient(conn).ListImages(b.Context(), &runtimeapi.ListImagesRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestBigMessages(t *testing.T) {
	socket, c := filepath.Join(t.TempDir(), "c.sock"), new(containerd)
	big := strings.Repeat("x", 20<<20)
	c.list = func(context.Context) (*runtimeapi.ListImagesResponse, error) {
		return &runtimeapi.ListImagesResponse{Images: []*runtimeapi.Image{{Id: big}}}, nil
	}
	c.serveAt(t, socket)
	conn, _ := serveProxy(t, socket, new(passed), nil)
	got, err := runtimeapi.NewImageServiceClient(conn).ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil || len(got.Images) != 1 || got.Images[0].Id != big {
		t.Errorf("20 MiB: %v", err)
	}
}

// A stream of answers passes whole; who doesn't read it holds the sender up.
func TestStreams(t *testing.T) {
	const n, size = 200, 64 << 10
	socket, c := filepath.Join(t.TempDir(), "c.sock"), new(containerd)
	var sent atomic.Int64
	c.events = func(s grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
		for i := range n {
			if err := s.Send(&runtimeapi.ContainerEventResponse{ContainerId: fmt.Sprint(i), PodSandboxStatus: &runtimeapi.PodSandboxStatus{Id: strings.Repeat("x", size)}}); err != nil {
				return err
			}
			sent.Add(1)
		}
		return status.Error(codes.Aborted, "that's all")
	}
	c.serveAt(t, socket)
	conn, _ := serveProxy(t, socket, new(passed), nil)
	stream, err := runtimeapi.NewRuntimeServiceClient(conn).GetContainerEvents(t.Context(), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		e, err := stream.Recv()
		if err != nil || e.ContainerId != fmt.Sprint(i) {
			t.Fatalf("event %d: %v, %v", i, e.GetContainerId(), err)
		}
		if ahead := int(sent.Load()) - i; ahead > 100 {
			t.Fatalf("%d messages of 64 KiB are held somewhere", ahead)
		}
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("the end: %v", err)
	}
}

// containerd may start later, and again.
func TestContainerdRestarts(t *testing.T) {
	socket, c := filepath.Join(t.TempDir(), "c.sock"), new(containerd)
	arrived := make(chan struct{}, 1)
	c.list = func(ctx context.Context) (*runtimeapi.ListImagesResponse, error) {
		arrived <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	conn, end := serveProxy(t, socket, new(passed), nil)
	list := func() error {
		_, err := runtimeapi.NewImageServiceClient(conn).ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
		return err
	}
	if err := list(); status.Code(err) != codes.Unavailable {
		t.Errorf("before containerd starts: %v", err)
	}
	stop := c.serveAt(t, socket)
	broken := make(chan error, 1)
	go func() {
		for {
			err := list()
			if len(arrived) > 0 {
				broken <- err
				return
			} // else it isn't noticed yet that it's there
		}
	}()
	for len(arrived) == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	if err := <-broken; status.Code(err) != codes.Unavailable {
		t.Errorf("when it dies: %v", err)
	}
	next := &containerd{list: func(context.Context) (*runtimeapi.ListImagesResponse, error) {
		return &runtimeapi.ListImagesResponse{}, nil
	}}
	next.serveAt(t, socket)
	for deadline := time.Now().Add(20 * time.Second); ; {
		err := list()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("when it's there again: %v", err)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

// The end doesn't wait for calls, and a caller's patience counts at containerd.
func TestEnds(t *testing.T) {
	socket, c := filepath.Join(t.TempDir(), "c.sock"), new(containerd)
	began, gone := make(chan struct{}), make(chan error, 1)
	c.pull = func(ctx context.Context, _ *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
		close(began)
		<-ctx.Done()
		gone <- ctx.Err()
		return nil, ctx.Err()
	}
	c.serveAt(t, socket)
	p := new(passed)
	conn, end := serveProxy(t, socket, p, nil)
	ctx, cancel := context.WithCancel(t.Context())
	called := make(chan error, 1)
	go func() {
		_, err := runtimeapi.NewImageServiceClient(conn).PullImage(ctx, pullRequest("a.io/app", &runtimeapi.AuthConfig{Username: "u"}))
		called <- err
	}()
	<-began
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("containerd saw %v", err)
	}
	<-called
	began = make(chan struct{})
	go func() {
		_, err := runtimeapi.NewImageServiceClient(conn).PullImage(t.Context(), pullRequest("a.io/app", &runtimeapi.AuthConfig{Username: "u"}))
		called <- err
	}()
	<-began
	if err := end(); err != nil {
		t.Error(err)
	}
	if err := <-called; status.Code(err) != codes.Unavailable {
		t.Errorf("kubelet saw %v", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ends) != 2 || p.ends[0] == nil || p.ends[1] == nil {
		t.Errorf("the pulls ended with %v", p.ends)
	}
}

func FuzzPull(f *testing.F) {
	known, err := proto.Marshal(pullRequest("a.io/app:1", &runtimeapi.AuthConfig{Username: "u", Password: "p", ServerAddress: "https://a.io"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(known)
	f.Add([]byte("\xff"))
	f.Add([]byte("0000")) // fields that nobody knows
	f.Fuzz(func(t *testing.T, request []byte) {
		told := 0
		p := &proxy{Options: Options{Log: slog.New(slog.DiscardHandler), Pull: func(pull Pull) func(error) {
			if told++; told > 1 || !bytes.Contains(request, []byte(pull.Image)) || !bytes.Contains(request, []byte(pull.Pod.UID)) {
				t.Errorf("told %d times, now of %+v", told, pull)
			}
			return func(error) {}
		}}}
		p.pull(request)(nil)
	})
}

// Methods with a stream of requests aren't CRI's.
func TestStreamOfRequests(t *testing.T) {
	conn, _ := serveProxy(t, "/nowhere", new(passed), nil)
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, "/x/Y", grpc.ForceCodecV2(raw{}))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		err = s.SendMsg(new([]byte))
	}
	if err := s.RecvMsg(new([]byte)); status.Code(err) != codes.Unimplemented && err != io.EOF {
		t.Errorf("got %v", err)
	}
}
