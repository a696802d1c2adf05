// Package cri stands between kubelet and the image service of containerd's CRI,
// to learn for which pods and with which credentials images are pulled: kubelet
// has them from a pod's pull secrets or its own plugins, passes them with
// PullImage, and nobody can be asked for them again.
//
//	kubelet --image-service-endpoint=unix:///run/sluice/cri.sock
//
// Serve forwards every method, also those of later versions, byte for byte: only
// PullImage's request is looked into. Deadlines, metadata, errors and their
// details pass both ways, and one message at a time is held, so who reads slowly
// slows down who writes.
//
// Runtime asks containerd which container of which pod an ID is.
package cri

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"sluice/internal/node/happening"
	"sluice/internal/remote"
	"sluice/oci"
)

const (
	// maxMessage bounds a message, in bytes: four times what containerd and
	// kubelet take.
	maxMessage = 64 << 20

	// connectTimeout is how long containerd may take to greet, and maxBackoff
	// how long after it's there again nobody may have noticed.
	connectTimeout, maxBackoff = 5 * time.Second, time.Second
)

// Options configures Serve. Socket and Pull are required.
type Options struct {
	// Socket is where containerd's CRI answers. It need not be there yet.
	Socket string

	// Pull is called when a pull begins; what it returns when the pull ends,
	// with its error. It must be quick.
	Pull func(Pull) (end func(error))

	// Log receives what can't be understood. Nil discards it.
	Log *slog.Logger
}

// Pull is a pull that begins.
type Pull struct {
	Image      string            // its name as kubelet has it
	Credential remote.Credential // that kubelet passes; zero: none
	// Pod is for which one, and Annotations are that one's. kubelet says so;
	// other clients may not.
	Pod         happening.Pod
	Annotations map[string]string
}

// Serve answers kubelet on l until ctx ends, and closes l. Calls that are under
// way then are broken off: kubelet repeats them. While containerd isn't there
// calls fail with code Unavailable, as containerd's own socket has it.
func Serve(ctx context.Context, l net.Listener, o Options) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	conn, err := connect(o.Socket)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer conn.Close()
	p := &proxy{Options: o, conn: conn}
	server := grpc.NewServer(
		grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(p.forward), grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
	)
	defer context.AfterFunc(ctx, server.Stop)()
	if err := server.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve the CRI image service on %s: %w", l.Addr(), err)
	}
	return nil
}

// connect returns a connection to containerd, which is made when it's needed.
func connect(socket string) (*grpc.ClientConn, error) {
	retry := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff}
	return grpc.NewClient("passthrough:///containerd",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: connectTimeout}),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{}), grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
}

// proxy forwards calls.
type proxy struct {
	Options
	conn *grpc.ClientConn
}

// forward is one call. CRI's methods have one request each, and one answer or a
// stream of them.
func (p *proxy) forward(_ any, in grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(in)
	var request []byte
	if err := in.RecvMsg(&request); err != nil {
		return err
	}
	if err := in.RecvMsg(new([]byte)); err != io.EOF {
		return status.Errorf(codes.Unimplemented, "%s: methods with a stream of requests can't be forwarded", method)
	}
	end := func(error) {}
	if method == runtimeapi.ImageService_PullImage_FullMethodName {
		end = p.pull(request)
	}
	err := p.call(method, request, in)
	end(err)
	return err
}

// call asks containerd, and passes on what it answers.
func (p *proxy) call(method string, request []byte, in grpc.ServerStream) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if err := out.SendMsg(&request); err != nil && err != io.EOF { // whose reason RecvMsg has
		return err
	}
	if err := out.CloseSend(); err != nil {
		return err
	}
	header, err := out.Header()
	if err == nil {
		err = in.SendHeader(header)
	}
	if err != nil {
		return err
	}
	for {
		var answer []byte
		err := out.RecvMsg(&answer)
		if err != nil {
			in.SetTrailer(out.Trailer())
		}
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = in.SendMsg(&answer)
		}
		if err != nil {
			return err
		}
	}
}

// pull tells of a pull that begins. It returns what is to be called when the
// pull ends.
func (p *proxy) pull(request []byte) (end func(error)) {
	nothing := func(error) {}
	var req runtimeapi.PullImageRequest
	if err := proto.Unmarshal(request, &req); err != nil {
		p.Log.Warn("a pull can't be understood, and is forwarded as it is") // the error may quote a secret
		return nothing
	}
	image := req.GetImage().GetImage()
	c, err := credential(req.GetAuth(), image)
	if err != nil {
		p.Log.Warn("the credential of a pull can't be used", "image", image, "error", err)
	}
	sandbox := req.GetSandboxConfig()
	return p.Pull(Pull{Image: image, Credential: c, Pod: podOf(sandbox.GetMetadata()), Annotations: sandbox.GetAnnotations()})
}

// credential returns what kubelet passes for an image, which may be nothing. Of
// several it is the one that containerd uses.
func credential(a *runtimeapi.AuthConfig, image string) (remote.Credential, error) {
	var none remote.Credential
	if server := a.GetServerAddress(); server != "" {
		ref, err := oci.ParseReference(image)
		if err != nil {
			return none, err
		}
		if !isServer(server, ref.Registry) {
			return none, errors.New("it is for another server than the image's registry")
		}
	}
	switch {
	case a.GetUsername() != "":
		return remote.Credential{Username: a.GetUsername(), Password: a.GetPassword()}, nil
	case a.GetIdentityToken() != "":
		return remote.Credential{RefreshToken: a.GetIdentityToken()}, nil
	case a.GetAuth() != "":
		b, err := base64.StdEncoding.DecodeString(a.GetAuth())
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return none, errors.New("its auth isn't user:password in base64")
		}
		return remote.Credential{Username: user, Password: strings.Trim(password, "\x00")}, nil
	}
	return none, nil
}

// isServer reports whether a server's address, as docker writes it, is a
// registry's.
func isServer(address, registry string) bool {
	_, rest, ok := strings.Cut(address, "://")
	if !ok {
		rest = address
	}
	host, _, _ := strings.Cut(rest, "/")
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	return strings.EqualFold(host, registry)
}

// raw is a codec of messages that stay as they are.
type raw struct{}

// Name implements encoding.CodecV2. It is part of a call's content type.
func (raw) Name() string { return "proto" }

// Marshal implements encoding.CodecV2, of *[]byte.
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("message is a %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
}

// Unmarshal implements encoding.CodecV2, of *[]byte.
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("message is a %T", v)
	}
	*b = data.Materialize()
	return nil
}
