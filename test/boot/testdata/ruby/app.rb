require 'json'
require 'webrick'
require_relative 'lib/greet'

server = WEBrick::HTTPServer.new(Port: 0, BindAddress: '127.0.0.1', StartCallback: -> { puts "ready #{JSON.generate(hello: greet)}"; $stdout.flush })
server.start
