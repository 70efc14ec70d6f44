package lattice

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Results bring the outputs of all final tasks in one message.
const maxMessageBytes = 256 << 20

// dial returns a connection that is made by the first call.
//
// LATTICE_TLS_CA names a file with the certificate to know the server by, LATTICE_TLS_CERT and LATTICE_TLS_KEY the
// caller's own, and LATTICE_TOKEN is the token to show. Without TLS or a token the server must be on this machine.
func dial(target string) (*grpc.ClientConn, error) {
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return nil, fmt.Errorf("%q is no address of the form HOST:PORT: %w", target, err)
	}
	isNear := host == "localhost" || net.ParseIP(host).IsLoopback()
	ca, token := os.Getenv("LATTICE_TLS_CA"), os.Getenv("LATTICE_TOKEN")
	if !isNear && (ca == "" || token == "") {
		return nil, fmt.Errorf("%s is beyond this machine: set LATTICE_TLS_CA and LATTICE_TOKEN", target)
	}
	options := []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		// Tells when a server is gone that never said so.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 2, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	if isNear {
		// Not by way of another machine, whatever proxy the environment names.
		options = append(options, grpc.WithNoProxy())
	}
	if ca == "" {
		options = append(options, grpc.WithInsecure())
	} else {
		config, err := tlsConfig(ca, os.Getenv("LATTICE_TLS_CERT"), os.Getenv("LATTICE_TLS_KEY"))
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	}
	if token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer{token, !isNear}))
	}
	return grpc.Dial(target, options...)
}

func tlsConfig(ca, cert, key string) (*tls.Config, error) {
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", ca)
	}
	if cert != "" {
		own, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{own}
	}
	return config, nil
}

// bearer shows a token with each call.
type bearer struct {
	token    string
	needsTLS bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.needsTLS }
