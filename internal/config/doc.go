// Package config is the configuration of Sluice's registry: Registry has a field
// for every key, Load fills one from a TOML file, the environment and flags, and
// Check says what can't be used.
//
// Everything is strict, and everything is told at once: a key that doesn't exist,
// a value of the wrong type and one out of range each become a Problem that
// names the key, the value, where it came from and what is allowed. Flags
// outweigh the environment, that outweighs the file, and what is nowhere has its
// default.
//
// The name in the environment follows from the key: SLUICE_REGISTRY_ and the key
// in capitals with _ for each dot, as in SLUICE_REGISTRY_STORAGE_S3_BUCKET for
// storage.s3.bucket and SLUICE_REGISTRY_WEBHOOKS_0_URL for the url of the first
// of webhooks. Lists are separated by commas.
//
// Secrets are of type Secret. Their text may be in a file that KEY_file names, or
// in the environment, but not in the configuration file, and nothing that this
// package prints has them.
package config
