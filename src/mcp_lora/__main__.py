from mcp_lora.cli.app import main

main()
