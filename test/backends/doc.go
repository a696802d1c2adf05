// Package backends holds the object stores to the promises of storage.Store on
// real servers: Azurite and MinIO, which package bed starts.
package backends
