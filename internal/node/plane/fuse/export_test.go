package fuse

// WithoutResend makes the kernel one before 6.9, that can't resend.
func (o Options) WithoutResend() Options {
	o.without = initHasResend
	return o
}
